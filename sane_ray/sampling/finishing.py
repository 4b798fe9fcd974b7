"""From decoded weights to networks that can be loaded and run: fitted to a target, completed, batch norms conditioned.

What is drawn for it has the network's own weights for a seed, and images are always the same training images: so a
network that is measured, and written later, is the same. Never draws a network, never imports Ray.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from sane_ray.sampling.batch_norm import condition_as, training_batches
from sane_ray.sampling.generation import Weights, state_dict
from sane_ray.sampling.plan import SamplePlan
from sane_ray.sampling.targets import Target

_TWIN_NOISE = 0.01
"""Of the spread of a tensor: noise on channels that a wider target has more than once."""


def finished(plan: SamplePlan, weights: Weights) -> Weights:
    """From weights of the anchors' architecture to those of the networks that come out, [R, *shape] each."""
    return conditioned(plan, fitted(plan, weights))


def fitted(plan: SamplePlan, weights: Weights) -> Weights:
    """The same, with the running statistics as they were decoded."""
    count = len(next(iter(weights.values())))
    if plan.target is not None:
        networks = [_fitted(plan.target, state_dict(weights, index)) for index in range(count)]
        weights = {key: torch.stack([network[key] for network in networks]) for key in networks[0]}
    return _completed(weights, plan.rest, count) if plan.network is not None else weights


def conditioned(plan: SamplePlan, weights: Weights) -> Weights:
    """Networks with running statistics estimated from training images, as ``sampling.batch_norm`` says."""
    how = plan.config.batch_norm
    if plan.network is None or plan.images is None or how == "keep":
        return weights
    module, batches = plan.network.build(), training_batches(plan.images, how)
    networks = []
    for index in range(len(next(iter(weights.values())))):
        module.load_state_dict(state_dict(weights, index))
        condition_as(how, module, batches)
        networks.append({key: value.detach().clone() for key, value in module.state_dict().items()})
    return {key: torch.stack([network[key] for network in networks]) for key in networks[0]}


def _completed(weights: Weights, rest: Mapping[str, Tensor], count: int) -> Weights:
    """With the entries that never were tokens, such as counts of batches, as the network has them when it is built."""
    return weights | {key: value.expand(count, *value.shape).clone() for key, value in rest.items()}


def _fitted(target: Target, network: Weights) -> Weights:
    """One network of the target's architecture.

    Channels that are there more than once get a little noise, which lets training tell them apart (Chen et al. 2016).
    """
    seed = zlib.crc32(b"".join(value.contiguous().numpy().tobytes() for value in network.values()))
    rng = torch.Generator().manual_seed(seed)
    copies = {}
    for key, value in network.items():
        noise = torch.randn(target.copies, *value.shape, generator=rng) * _TWIN_NOISE * float(value.std(correction=0))
        noise[0] = 0
        copies[key] = (value + noise)[None]
    return state_dict(target.apply(copies, seed), 0)
