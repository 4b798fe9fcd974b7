"""A trained SANE over the tokens of networks: embeddings of tokens, and what is kept of them for layers and networks.

Plain torch: in a notebook, in a test, or in the actors of ``sane_ray.embedding.writing``. Many small networks go
through the model together, a large one some windows at a time, in memory that does not grow with it. Never reads a
file, never normalises, never imports Ray.

Shape suffixes: R networks of one architecture, N tokens of a network, n tokens of a range, T values of a token, L
values of an embedding, S windows, W tokens of a window with its halo, G groups of tokens: the whole network, and then
each of its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.autoencoder.halo import Windows
from sane_ray.autoencoder.losses import explained_variance, signal_mask
from sane_ray.autoencoder.model import SANE
from sane_ray.autoencoder.positions import POSITION_NAMES
from sane_ray.config import AutoencoderConfig, EmbeddingConfig
from sane_ray.errors import InputError
from sane_ray.hardware import has_bfloat16
from sane_ray.tokens.layers import LayerTable

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
VECTORS = ("mean", "std", *(f"q{round(100 * quantile):02d}" for quantile in QUANTILES))
"""What is kept of the embeddings of a network's or layer's tokens, each a vector of L values."""

VARIANCES = 4
SHAPE = (
    *("norm_mean", "norm_std", *(f"norm_q{round(100 * quantile):02d}" for quantile in QUANTILES)),
    *("mean_norm", "effective_rank", *(f"variance_{place + 1}" for place in range(VARIANCES))),
)
"""What is kept of their shape, which no rotation of the latent space changes: mean, deviation and quantiles of the
lengths of token embeddings, the length of the mean embedding, the effective rank of their covariance (exp of the
entropy of its eigenvalues) and its largest eigenvalues."""

EXACT_TOKENS = 65536
"""Quantiles and shape of more tokens are those of so many of them, spread over them all: off by 0.2 % of the ranks."""

_TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 65536}
"""On a CPU what its caches hold, on a GPU what keeps it busy."""

Read = Callable[[int, int], Tensor]
"""Normalised tokens ``start`` to ``stop`` of R networks of one architecture, float32 [R, stop - start, T]."""
Keep = Callable[[int, Tensor], object]
"""Takes embeddings of tokens: the first of them, and float32 [R, n, L] on the model's device."""


@dataclass(frozen=True)
class Summary:
    """What is kept of R networks of one architecture. Group 0 is the whole network, group 1 + i its layer i."""

    vectors: dict[str, NDArray[np.float32]]
    """By a name in ``VECTORS``: [R, G, L]. The standard deviation is that of the tokens themselves (no Bessel)."""
    shape: NDArray[np.float32]
    """The numbers of ``SHAPE``, [R, G, len(SHAPE)]."""
    mse: NDArray[np.float64] | None
    """Squared error of reconstructed real weights, as normalised, [R, G]; None where nothing was decoded."""
    explained_variance: NDArray[np.float64] | None
    """1 - Var(error) / Var(weights) of the same, [R, G]; NaN where the weights do not vary."""


def in_memory(tokens_RNT: Tensor) -> Read:
    """Reads networks that are all in memory."""
    return lambda start, stop: tokens_RNT[:, start:stop]


class Embedder:
    """Embeds networks with a trained model.

    Attributes:
        model: The model, on the device that it computes on.
        window: Tokens of a network that a window embeds.
        halo: Tokens on each side that it reads for context.
        dtype: Number format of the matrix products.
        tokens_at_once: Tokens that go through the model together.
    """

    def __init__(
        self, model: SANE, config: EmbeddingConfig | None = None, device: str | torch.device | None = None
    ) -> None:
        """Puts the model in evaluation mode on a device: by default a GPU if there is one.

        Raises:
            InputError: The halo leaves no place in the training window.
        """
        self.config = config or EmbeddingConfig()
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(device).eval()
        self.window, self.halo = window_and_halo(model.config, self.config)
        self.dtype = choose_format(self.config.precision, device)
        self.tokens_at_once = self.config.tokens_at_once or _TOKENS_AT_ONCE[device.type]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.token_in.weight.device

    def networks_at_once(self, table: LayerTable) -> int:
        """How many networks of an architecture go through the model together."""
        windows = Windows(table.num_tokens, self.window, self.halo)
        return max(1, self.tokens_at_once // (len(windows) * windows.length))

    @torch.inference_mode()
    def embed(self, read: Read, table: LayerTable, networks: int = 1, keep: Keep | None = None) -> Summary:
        """Embeds networks of one architecture, and keeps the summary of each.

        Args:
            read: Gives their tokens, from front to back; ranges overlap where there is a halo.
            table: Their layers.
            networks: How many there are, R; best ``networks_at_once``.
            keep: Is given the embeddings of all tokens, from front to back.

        Raises:
            InputError: The model has no positions for networks of this architecture, or another token size.
        """
        check_fits_model(table, self.model.config)
        windows = Windows(table.num_tokens, self.window, self.halo)
        sums = _Sums(table)
        for part in windows.split(max(1, self.tokens_at_once // (networks * windows.length))):
            (begin, end), (first, stop) = part.span, part.content
            tokens_RnT = read(begin, end).to(self.device, non_blocking=True)
            z_RnL, decoded_RnT = self._through(part, tokens_RnT, table)
            sums.add(first, z_RnL, decoded_RnT, tokens_RnT[:, first - begin : stop - begin])
            if keep is not None:
                keep(first, z_RnL)
        return sums.summary()

    def encode(self, tokens_RNT: Tensor, table: LayerTable) -> Tensor:
        """Embeddings of all tokens of some networks, float32 [R, N, L] on the CPU.

        Args:
            tokens_RNT: All their tokens, normalised.
            table: Their layers.
        """
        parts: list[Tensor] = []
        self.embed(in_memory(tokens_RNT), table, len(tokens_RNT), lambda _, z_RnL: parts.append(z_RnL.cpu()))
        return torch.cat(parts, dim=1)

    def _through(self, windows: Windows, tokens_RnT: Tensor, table: LayerTable) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the windows' content, and what they are decoded to, float32 [R, content, L or T]."""
        networks, (begin, end) = len(tokens_RnT), windows.span
        positions_SW3 = windows.cut(torch.from_numpy(table.positions_of(begin, end).copy()))
        positions_BW3 = positions_SW3.to(self.device).expand(networks, -1, -1, -1).flatten(0, 1)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            z_BWL = self.model.encode(windows.cut(tokens_RnT).flatten(0, 1), positions_BW3)
            decoded_BWT = self.model.decode(z_BWL, positions_BW3) if self.config.reconstruction else None
        z_RnL, decoded_RnT = (
            None if rows is None else windows.join(rows.unflatten(0, (networks, -1))).float()
            for rows in (z_BWL, decoded_BWT)
        )
        assert z_RnL is not None
        return z_RnL, decoded_RnT


def window_and_halo(model: AutoencoderConfig, config: EmbeddingConfig) -> tuple[int, int]:
    """Tokens of content of a window, and of context on each side of it.

    By default there is no halo, and with one the window shrinks: in all it is as long as in training.

    Raises:
        InputError: The halo leaves no place in the training window.
    """
    window = config.window or model.window - 2 * config.halo
    if window < 1:
        raise InputError(
            f"config field embedding.halo is {config.halo}: on both sides that leaves nothing of the training window "
            f"of {model.window} tokens: set it to {(model.window - 1) // 2} or less, or set embedding.window too"
        )
    return window, config.halo


def choose_format(wanted: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The number format of the matrix products; ``auto`` is bfloat16 where the device multiplies it natively."""
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def check_fits_model(table: LayerTable, config: AutoencoderConfig) -> None:
    """Raises ``InputError`` unless a model has the token size and the positions for networks of an architecture."""
    if table.token_size != config.token_size:
        raise InputError(
            f"its tokens have {table.token_size} values, but those of the model {config.token_size}: prepare it with "
            f"--tokens.token_size {config.token_size}"
        )
    if config.positions != "learned":
        return
    for i, (name, needed, size) in enumerate(
        zip(POSITION_NAMES, table.position_sizes, config.max_positions, strict=True)
    ):
        if needed > size:
            raise InputError(
                f"it needs {needed:,} positions of the {name}, but autoencoder.max_positions[{i}] of the model is "
                f"{size:,}: use a model with larger tables, or one trained with --autoencoder.positions sinusoidal, "
                "which has positions for any network"
            )


class _Sums:
    """What the summary of R networks is made of, gathered from front to back; layers are finished as they end."""

    def __init__(self, table: LayerTable) -> None:
        self._table = table
        self._whole = _Group(table.num_tokens)
        self._layer = _Group(0)
        self._finished: list[dict[str, Any]] = []

    def add(self, first: int, z_RnL: Tensor, decoded_RnT: Tensor | None, tokens_RnT: Tensor) -> None:
        """Takes the next tokens of all networks."""
        stop = first + z_RnL.shape[1]
        signal_n = torch.from_numpy(self._table.signal_of(first, stop).copy()).to(z_RnL.device)
        errors_Rn5 = None if decoded_RnT is None else _errors(decoded_RnT, tokens_RnT, signal_n)
        self._whole.sample(z_RnL)
        begin = 0
        for index, start, end in self._table.slices(first, stop):
            if start == 0:
                self._layer = _Group(self._table.layers[index].num_tokens)
            rows = slice(begin, begin + end - start)
            self._layer.sample(z_RnL[:, rows])
            self._layer.merge(_moments(z_RnL[:, rows], None if errors_Rn5 is None else errors_Rn5[:, rows]))
            if end == self._table.layers[index].num_tokens:
                self._whole.merge(self._layer.moments)
                self._finished.append(self._layer.finish())
            begin += end - start

    def summary(self) -> Summary:
        """Of everything that was added, which must be whole networks."""
        groups = [self._whole.finish(), *self._finished]
        vectors = {name: np.stack([group[name] for group in groups], axis=1) for name in VECTORS}
        shape = np.stack([group["shape"] for group in groups], axis=1)
        if groups[0]["mse"] is None:
            return Summary(vectors, shape, None, None)
        errors = (np.stack([group[name] for group in groups], axis=1) for name in ("mse", "explained_variance"))
        return Summary(vectors, shape, *errors)


class _Moments(NamedTuple):
    """Of some tokens of each of R networks, in float64."""

    tokens: int
    mean_RL: Tensor
    squares_RL: Tensor
    """Sum of squared deviations from the mean."""
    errors_R5: Tensor | None
    """``explained_variance_sums`` of their weights."""


def _moments(z_RnL: Tensor, errors_Rn5: Tensor | None) -> _Moments:
    exact_RnL = z_RnL.double()
    mean_RL = exact_RnL.mean(dim=1)
    squares_RL = (exact_RnL - mean_RL[:, None]).square_().sum(dim=1)
    return _Moments(z_RnL.shape[1], mean_RL, squares_RL, None if errors_Rn5 is None else errors_Rn5.sum(dim=1))


def _merged(first: _Moments, second: _Moments) -> _Moments:
    """The moments of the tokens of both (Chan, Golub and LeVeque 1979)."""
    tokens, gap_RL = first.tokens + second.tokens, second.mean_RL - first.mean_RL
    mean_RL = first.mean_RL + gap_RL * (second.tokens / tokens)
    squares_RL = first.squares_RL + second.squares_RL + gap_RL**2 * (first.tokens * (second.tokens / tokens))
    pair = first.errors_R5, second.errors_R5
    errors_R5 = None if pair[0] is None or pair[1] is None else pair[0] + pair[1]
    return _Moments(tokens, mean_RL, squares_RL, errors_R5)


class _Group:
    """Some tokens of each of R networks: moments of all, and the embeddings of those that quantiles are taken of."""

    moments: _Moments

    def __init__(self, tokens: int) -> None:
        self._chosen = _spread(tokens, EXACT_TOKENS) if tokens > EXACT_TOKENS else None
        self._seen = 0
        self._sample: list[Tensor] = []

    def sample(self, z_RnL: Tensor) -> None:
        """Takes the next embeddings for the quantiles."""
        first, self._seen = self._seen, self._seen + z_RnL.shape[1]
        if self._chosen is not None:
            begin, end = np.searchsorted(self._chosen, [first, self._seen])
            z_RnL = z_RnL.index_select(1, torch.from_numpy(self._chosen[begin:end] - first).to(z_RnL.device))
        self._sample.append(z_RnL)

    def merge(self, moments: _Moments) -> None:
        """Takes the moments of the next embeddings."""
        self.moments = _merged(self.moments, moments) if hasattr(self, "moments") else moments

    def finish(self) -> dict[str, Any]:
        """Every vector [R, L] and error [R], on the CPU."""
        tokens, mean_RL, squares_RL, errors_R5 = self.moments
        sample_RnL, self._sample = torch.cat(self._sample, dim=1), []
        ordered_RnL = _sorted(sample_RnL)
        quantiles = [_quantile(ordered_RnL, quantile) for quantile in QUANTILES]
        values = zip(VECTORS, (mean_RL, (squares_RL / tokens).sqrt(), *quantiles), strict=True)
        found: dict[str, Any] = {name: value.float().cpu().numpy() for name, value in values}
        found["shape"] = _shape(sample_RnL, mean_RL.to(sample_RnL)).cpu().numpy()
        if errors_R5 is None:
            return found | {"mse": None, "explained_variance": None}
        sums_5R = errors_R5.cpu().T
        return found | {
            "mse": (sums_5R[2] / sums_5R[0]).numpy(),
            "explained_variance": explained_variance(sums_5R).numpy(),
        }


def _errors(decoded_RnT: Tensor, tokens_RnT: Tensor, signal_n: Tensor) -> Tensor:
    """The sums of ``explained_variance_sums`` for each token by itself, float64 [R, n, 5]."""
    mask_nT = signal_mask(signal_n, tokens_RnT.shape[-1])
    error = (decoded_RnT - tokens_RnT).masked_fill(~mask_nT, 0.0)
    target = tokens_RnT.masked_fill(~mask_nT, 0.0)
    counts = signal_n.double().expand(error.shape[:2])
    terms = (error.sum(dim=-1), error.square().sum(dim=-1), target.sum(dim=-1), target.square().sum(dim=-1))
    return torch.stack([counts, *(term.double() for term in terms)], dim=-1)


def _shape(z_RnL: Tensor, mean_RL: Tensor) -> Tensor:
    """The numbers of ``SHAPE`` for some tokens of each of R networks, float32 [R, len(SHAPE)]."""
    norms_Rn1 = z_RnL.norm(dim=2, keepdim=True)
    ordered_Rn1 = _sorted(norms_Rn1)
    lengths = [norms_Rn1.mean(dim=1), norms_Rn1.std(dim=1, correction=0)]
    lengths += [_quantile(ordered_Rn1, quantile) for quantile in QUANTILES]
    centred_RnL, (tokens, values) = z_RnL - mean_RL[:, None], z_RnL.shape[1:]
    products = centred_RnL.mT @ centred_RnL if values < tokens else centred_RnL @ centred_RnL.mT
    spectrum_RE = torch.linalg.eigvalsh(products / tokens).clamp(min=0).flip(-1)
    shares_RE = spectrum_RE / spectrum_RE.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    rank_R1 = torch.special.entr(shares_RE).sum(dim=-1, keepdim=True).exp()
    largest_RV = torch.nn.functional.pad(spectrum_RE, (0, VARIANCES))[:, :VARIANCES]
    return torch.cat([*lengths, mean_RL.norm(dim=1, keepdim=True), rank_R1, largest_RV], dim=1)


def _sorted(values_RnL: Tensor) -> Tensor:
    """Sorted along the second axis; on a CPU by numpy, which takes a tenth of the time."""
    if values_RnL.device.type != "cpu":
        return values_RnL.sort(dim=1).values
    ordered_RLn = np.array(values_RnL.numpy().transpose(0, 2, 1), order="C")
    ordered_RLn.sort(axis=-1)
    return torch.from_numpy(ordered_RLn).transpose(1, 2)


def _quantile(ordered_RnL: Tensor, quantile: float) -> Tensor:
    """A quantile of sorted values along their second axis, [R, L], between two of them by linear interpolation."""
    place = quantile * (ordered_RnL.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered_RnL.shape[1] - 1)
    return torch.lerp(ordered_RnL[:, below], ordered_RnL[:, above], place - below)


def _spread(tokens: int, count: int) -> NDArray[np.int64]:
    """So many different tokens in order, one drawn from each of equal stretches; always the same."""
    bounds = np.arange(count + 1) * tokens // count
    return np.random.default_rng(0).integers(bounds[:-1], bounds[1:])
