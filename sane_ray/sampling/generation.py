"""Between networks, their normalised tokens and their embeddings: both ways, many networks at once, in bounded memory.

Plain torch. Normalisation and windows are those of the model's training. Never draws, never looks at an image, never
imports Ray.

Shape suffixes: R networks, N tokens of a network, T values of a token, L values of an embedding, V weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sane_ray.autoencoder.halo import Windows
from sane_ray.autoencoder.model import SANE
from sane_ray.config import EmbeddingConfig, SamplingConfig
from sane_ray.embedding.encoder import Embedder
from sane_ray.embedding.preprocessing import Preprocessing
from sane_ray.pretraining.networks import Decoder
from sane_ray.tokens.store import Architecture
from sane_ray.tokens.tokenizer import tokenize

Weights = dict[str, Tensor]
"""State dict of one network, or of several: then each value has an axis of networks first."""


class Codec:
    """Networks of one architecture, as weights, normalised tokens and embeddings.

    Raises:
        InputError: the model does not fit the architecture.
    """

    def __init__(self, model: SANE, architecture: Architecture, config: SamplingConfig, device: str = "") -> None:
        prepared = Preprocessing(model).of_store(architecture)
        self.table = prepared.table
        self.normalization = prepared.normalization
        self._embedder = Embedder(
            model,
            EmbeddingConfig(window=config.window, halo=config.halo, precision=config.precision, reconstruction=False),
            device or None,
        )
        as_trained = Architecture(architecture.name, self.table, architecture.symmetry, self.normalization)
        self._decoder = Decoder(as_trained, torch.device("cpu"))

    @cached_property
    def signal_NT(self) -> Tensor:
        """Which values of the tokens are weights, bool."""
        counts = torch.from_numpy(np.asarray(self.table.signal_counts))
        return torch.arange(self.table.token_size) < counts[:, None]

    def tokens(self, networks: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Normalised tokens of state dicts, float32 [R, N, T]."""
        return torch.stack(
            [self.normalization.normalize(tokenize(network, self.table), self.table)[0] for network in networks]
        )

    def encode(self, tokens_RNT: Tensor) -> Tensor:
        """Embeddings of whole networks, float32 [R, N, L] on the CPU."""
        at_once = self._embedder.networks_at_once(self.table)
        return torch.cat([self._embedder.encode(some, self.table) for some in tokens_RNT.split(at_once)])

    @torch.inference_mode()
    def decode(self, z_RNL: Tensor) -> Tensor:
        """Normalised tokens of embeddings, float32 [R, N, T] on the CPU; padding has no meaning."""
        at_once = self._embedder.networks_at_once(self.table)
        return torch.cat([self._decode(some) for some in z_RNL.split(at_once)]).clone()

    def weights(self, tokens_RNT: Tensor) -> Weights:
        """Weights by key, float32 [R, *shape], of normalised tokens."""
        return self._decoder(tokens_RNT)

    def values(self, tokens_RNT: Tensor) -> Tensor:
        """The weights among the normalised values of tokens, [R, V]."""
        return tokens_RNT[:, self.signal_NT]

    def _decode(self, z_RNL: Tensor) -> Tensor:
        embedder, table = self._embedder, self.table
        windows, parts = Windows(table.num_tokens, embedder.window, embedder.halo), []
        for some in windows.split(max(1, embedder.tokens_at_once // (len(z_RNL) * windows.length))):
            begin, end = some.span
            positions_SW3 = some.cut(torch.from_numpy(table.positions_of(begin, end).copy())).to(embedder.device)
            positions_BW3 = positions_SW3.expand(len(z_RNL), -1, -1, -1).flatten(0, 1)
            z_BWL = some.cut(z_RNL[:, begin:end].to(embedder.device)).flatten(0, 1)
            with torch.autocast(embedder.device.type, embedder.dtype, enabled=embedder.dtype != torch.float32):
                decoded_BWT = embedder.model.decode(z_BWL, positions_BW3)
            parts.append(some.join(decoded_BWT.unflatten(0, (len(z_RNL), -1))).float().cpu())
        return torch.cat(parts, dim=1)


def state_dict(weights: Weights, index: int) -> Weights:
    """One network of several."""
    return {key: value[index] for key, value in weights.items()}
