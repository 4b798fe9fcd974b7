"""Methods: where the weights of a new network come from, and which of many draws are kept.

A method is a source of draws, and a selection on validation images. Sources differ in what they draw in: embeddings of
SANE, or normalised weights; the densities are the same, so that each way of SANE has its baseline. Test images are
measured beside the validation images, and decide nothing. How networks are measured is given from outside: this module
never touches images, files or Ray.

Shape suffixes: K anchors, R draws, N tokens, T values of a token, L values of an embedding, X either.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.config import SamplingConfig
from sane_ray.sampling import densities
from sane_ray.sampling.densities import Density, Draws
from sane_ray.sampling.generation import Codec, Weights

Space = Literal["embeddings", "weights"]


@dataclass(frozen=True)
class Source:
    """Where draws come from."""

    space: Space
    density: Density
    scale: Literal["bandwidth", "published", "matched", "shared", "fraction", "several", "one", "random"]
    """What the density's scale is: the chosen bandwidth, the published one, noise as far from the anchors as
    `sane_kde`, or as `sane_kde_published`, a fraction of the way to another anchor, some anchors, one deviation, or
    that of the published random embeddings."""
    words: str
    """What a table says of it."""


SOURCES: dict[str, Source] = {
    "anchors": Source("weights", densities.anchors_themselves, "one", "the anchors themselves"),
    "reconstruction": Source("embeddings", densities.anchors_themselves, "one", "anchors, encoded and decoded"),
    "sane_kde": Source("embeddings", densities.joint_kde, "bandwidth", "kernels over whole networks"),
    "sane_kde_token": Source("embeddings", densities.token_kde, "bandwidth", "kernels for each token"),
    "sane_kde_dimension": Source("embeddings", densities.dimension_kde, "bandwidth", "kernels for each value"),
    "sane_kde_published": Source("embeddings", densities.published_kde, "published", "kernels of one shared seed"),
    "sane_gaussian": Source("embeddings", densities.gaussian, "one", "a shrunk Gaussian"),
    "sane_mixture": Source("embeddings", densities.mixture, "one", "a mixture of Gaussians"),
    "sane_interpolation": Source("embeddings", densities.interpolation, "fraction", "between embeddings of neighbours"),
    "sane_random": Source("embeddings", densities.random, "random", "random embeddings"),
    "noise": Source("weights", densities.joint_kde, "matched", "noise added to anchors"),
    "shared_noise": Source("weights", densities.shared_kde, "shared", "noise that all tokens share"),
    "average": Source("weights", densities.average, "several", "means of five anchors"),
    "interpolation": Source("weights", densities.interpolation, "fraction", "between weights of neighbours"),
}
"""By name; ``scratch`` has none: those networks begin as their params initialise them."""


def is_of_sane(method: str) -> bool:
    """Whether the networks of a method, such as ``sane_kde:best``, were decoded from embeddings."""
    source = SOURCES.get(method.partition(":")[0])
    return source is not None and source.space == "embeddings"


SWEPT = {
    "sane_kde": "bandwidths",
    "sane_kde_published": "bandwidths",
    "sane_interpolation": "fractions",
    "noise": "noises",
    "shared_noise": "noises",
    "interpolation": "fractions",
    "average": "averaged",
}
"""Sources whose accuracy is drawn against novelty, and the config field of the scales."""

AVERAGED = 5
"""Anchors in an average that is a method by itself."""

_SAME = 1e-4
"""Networks are the same whose weights differ by less than this share of their length."""

HALF_WAY = 0.5
"""Fraction of an interpolation that is a method by itself: as far from both anchors as can be."""


@dataclass(frozen=True)
class Measured:
    """What some networks are worth, as they are; arrays have a value a network."""

    val_acc: NDArray[np.float64]
    val_loss: NDArray[np.float64]
    test_acc: NDArray[np.float64]
    predictions_RI: NDArray[np.int16]
    """Classes of the test images."""


Measure = Callable[[Weights], Measured]
"""Measures networks [R, *shape] on validation and test images."""


@dataclass(frozen=True)
class Pool:
    """Networks that were drawn in one way, and what they are worth; those that exploded are left out of all arrays."""

    tokens_RNT: Tensor
    """Normalised weights."""
    latents_RNL: Tensor | None
    """What they were decoded from."""
    parents: list[list[int]]
    measured: Measured | None
    """None where networks of this kind cannot be run."""
    scale: float
    exploded: int
    """How many were left out: NaN, infinite or beyond ``sampling.largest_weight``."""

    def __len__(self) -> int:
        return len(self.tokens_RNT)

    def take(self, rows: Sequence[int]) -> Pool:
        """Some of them, in this order."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        measured = self.measured
        if measured is not None:
            arrays = {
                field.name: getattr(measured, field.name)[index.numpy()] for field in dataclasses.fields(measured)
            }
            measured = Measured(**arrays)
        latents = None if self.latents_RNL is None else self.latents_RNL[index]
        parents = [self.parents[row] for row in rows]
        return dataclasses.replace(
            self, tokens_RNT=self.tokens_RNT[index], latents_RNL=latents, parents=parents, measured=measured
        )

    @property
    def best_first(self) -> list[int]:
        """Rows by validation accuracy, ties by validation loss."""
        if self.measured is None:
            return list(range(len(self)))
        return np.lexsort((self.measured.val_loss, -self.measured.val_acc)).tolist()


class Sampler:
    """Draws networks near anchors and selects them.

    Attributes:
        tokens_KNT: The anchors' normalised weights, aligned, the best first.
    """

    def __init__(
        self, codec: Codec, anchors: Sequence[Mapping[str, Tensor]], measure: Measure | None, config: SamplingConfig
    ) -> None:
        self.codec, self.measure, self.config = codec, measure, config
        self.tokens_KNT = codec.tokens(anchors)
        self._pools: dict[tuple[str, float], Pool] = {}

    @cached_property
    def latents_KNL(self) -> Tensor:
        """Embeddings of the anchors."""
        return self.codec.encode(self.tokens_KNT)

    @cached_property
    def bandwidths(self) -> list[float]:
        """What is tried, in units of the embedding."""
        unit = densities.spread(self.latents_KNL) or 1.0
        return [unit * bandwidth for bandwidth in self.config.bandwidths]

    @cached_property
    def bandwidth(self) -> float:
        """Of ``sane_kde``: the config's, or the largest whose validation accuracy is within an error of the best.

        This is the rule of one standard error (Breiman et al. 1984), which is for what is new where accuracy cannot
        tell. Without images the least.
        """
        if self.config.bandwidth:
            return self.config.bandwidth
        if self.measure is None:
            return self.bandwidths[0]
        pools = {bandwidth: self.pool("sane_kde", bandwidth) for bandwidth in self.bandwidths}
        scores = {b: pool.measured.val_acc for b, pool in pools.items() if pool.measured is not None and len(pool) > 1}
        if not scores:
            return self.bandwidths[0]
        best = max(scores.values(), key=lambda score: float(score.mean()))
        least = float(best.mean()) - float(best.std(ddof=1)) / len(best) ** 0.5
        return max(bandwidth for bandwidth, score in scores.items() if float(score.mean()) >= least)

    def as_far_as(self, source: str) -> float:
        """Noise that brings networks as far from their anchors as another source does, in the mean."""
        pool = self.pool(source)
        return float(self.distances(pool.tokens_RNT).mean()) if len(pool) else self.config.noises[0]

    def distances(self, tokens_RNT: Tensor) -> NDArray[np.float64]:
        """Root-mean-square difference of normalised weights to the nearest anchor, [R]."""
        mine, theirs = self.codec.values(tokens_RNT), self.codec.values(self.tokens_KNT)
        distances: NDArray[np.float64] = torch.cdist(mine, theirs).min(1).values.double().numpy()
        return distances / theirs.shape[1] ** 0.5

    def scale(self, source: str) -> float:
        """The density's scale for a source as a method."""
        match SOURCES[source].scale:
            case "bandwidth":
                return self.bandwidth
            case "published":
                return densities.PUBLISHED_BANDWIDTH
            case "matched":
                return self.as_far_as("sane_kde")
            case "shared":
                return self.as_far_as("sane_kde_published")
            case "fraction":
                return HALF_WAY
            case "several":
                return AVERAGED
            case "random":
                return densities.PUBLISHED_RANDOM
            case "one":
                return 1.0

    def pool(self, source: str, scale: float | None = None) -> Pool:
        """Candidates of a source, drawn and measured once for each scale."""
        scale = self.scale(source) if scale is None else scale
        if (source, scale) not in self._pools:
            count = self.config.candidates
            if source in ("anchors", "reconstruction"):
                count = len(self.tokens_KNT)
            self._pools[source, scale] = self._drawn(source, self._anchors(source), count, self._seed(source), scale)
        return self._pools[source, scale]

    def sweep(self, source: str) -> Iterator[Pool]:
        """Candidates of a source at each of the scales that its accuracy is drawn against novelty for."""
        field = SWEPT[source]
        for scale in self.bandwidths if field == "bandwidths" else getattr(self.config, field):
            yield self.pool(source, scale)

    def kept(self, method: str) -> Pool:
        """The networks of a method: its first draws, its best, or the best of all rounds of a bootstrap."""
        source, _, selection = method.partition(":")
        pool = self.pool(source)
        wanted = self.config.repetitions
        if not selection or self.measure is None:
            return pool.take(range(min(wanted, len(pool))))
        if selection == "bootstrap":
            pool = self._bootstrap(source)
        return pool.take(pool.best_first[:wanted])

    def _bootstrap(self, source: str) -> Pool:
        """The best of each round are the anchors of the next; the best of all rounds come back, sorted.

        The published code returns the last round's in the order they were drawn.
        """
        pool = self.pool(source)
        rounds = [pool.take(pool.best_first[: self.config.repetitions])]
        for number in range(1, self.config.rounds):
            anchors = rounds[-1].latents_RNL if SOURCES[source].space == "embeddings" else rounds[-1].tokens_RNT
            if anchors is None or not len(anchors):
                break
            seed = self._seed(f"{source}:{number}")
            drawn = self._drawn(source, anchors, self.config.candidates, seed, self.scale(source))
            rounds.append(drawn.take(drawn.best_first[: self.config.repetitions]))
        return _joined(rounds)

    def _anchors(self, source: str) -> Tensor:
        return self.latents_KNL if SOURCES[source].space == "embeddings" else self.tokens_KNT

    def _seed(self, words: str) -> int:
        return zlib.crc32(f"{self.config.seed} {words}".encode())

    def _drawn(self, source: str, anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Pool:
        draws: Draws = SOURCES[source].density(anchors_KNX, count, seed, scale)
        latents = draws.values_RNX if SOURCES[source].space == "embeddings" else None
        tokens_RNT = draws.values_RNX if latents is None else self.codec.decode(latents)
        weights = self.codec.weights(tokens_RNT)
        fine = torch.nonzero(_finite(weights, self.config.largest_weight)).flatten()
        exploded = count - len(fine)
        fine = fine[_distinct(self.codec.values(tokens_RNT[fine]))]
        pool = Pool(tokens_RNT, latents, draws.parents, None, scale, exploded).take(fine.tolist())
        if self.measure is None or not len(pool):
            return pool
        return dataclasses.replace(pool, measured=self.measure({key: value[fine] for key, value in weights.items()}))


def _finite(weights: Weights, largest: float) -> Tensor:
    """Which networks have no NaN, infinite or exploded weight, [R]."""
    fine = [(value.flatten(1).abs() <= largest).all(1) for value in weights.values()]  # NaN compares as False
    return torch.stack(fine).all(0)


def _distinct(values_RV: Tensor) -> list[int]:
    """Rows of the networks that are drawn for the first time: few anchors have few pairs, and fewer averages."""
    distances_RR = torch.cdist(values_RV, values_RV, compute_mode="donot_use_mm_for_euclid_dist")
    close_RR = distances_RR <= _SAME * values_RV.norm(dim=1, keepdim=True)
    return [row for row in range(len(values_RV)) if not bool(close_RR[row, :row].any())]


def _joined(pools: Sequence[Pool]) -> Pool:
    exploded = sum(pool.exploded for pool in pools)
    pools = [pool for pool in pools if len(pool)] or pools[:1]
    measured = [pool.measured for pool in pools if pool.measured is not None]
    latents = [pool.latents_RNL for pool in pools if pool.latents_RNL is not None]
    names = [field.name for field in dataclasses.fields(Measured)]
    return Pool(
        torch.cat([pool.tokens_RNT for pool in pools]),
        torch.cat(latents) if latents else None,
        [parents for pool in pools for parents in pool.parents],
        Measured(**{name: np.concatenate([getattr(one, name) for one in measured]) for name in names})
        if measured
        else None,
        pools[0].scale,
        exploded,
    )
