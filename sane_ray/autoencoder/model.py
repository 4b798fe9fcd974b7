"""SANE: a transformer autoencoder over the tokens of a network's weights (arXiv 2406.09997, section 3.2).

Tokens of a window pass through a non-causal transformer into one small embedding a token, and through a second one
back. The model travels as a folder with ``config.json`` and ``model.safetensors``; torch is all that reading it needs.
This module never shards, never trains, and never imports Ray, MLflow, pandas or pyarrow.

Shape suffixes: B windows of a batch, W tokens of a window, T values of a token, D width of the transformer, H heads,
L values of an embedding, P values of a projection, N tokens of a whole model, S windows that cover a model; the 3 of a
position are token index, layer and channel.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sane_ray.autoencoder.folders import CONFIG_FILE, WEIGHTS_FILE, WHERE, instead_of_model
from sane_ray.autoencoder.halo import Windows
from sane_ray.autoencoder.positions import POSITION_NAMES, PositionEmbedding, SinusoidalPositions
from sane_ray.config import AutoencoderConfig
from sane_ray.errors import InputError
from sane_ray.nearby import is_zoo

if TYPE_CHECKING:
    from sane_ray.tokens.normalization import Normalization
    from sane_ray.tokens.tokenizer import LayerTable

FORMAT = "sane_ray.autoencoder"
FORMAT_VERSION = 1

_INITIAL_STD = 0.02
_WINDOWS_AT_ONCE = 32

_LOG = logging.getLogger(__name__)


class Attention(nn.Module):
    """Multi-head self-attention without biases; every token of a window sees every other one."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BWD: Tensor) -> Tensor:
        """[B, W, D] to [B, W, D]."""
        B, W, D = x_BWD.shape
        query, key, value = self.qkv(x_BWD).view(B, W, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHWd = attend(query, key, value, self.dropout, training=self.training)
        return self.out(mixed_BHWd.transpose(1, 2).reshape(B, W, D))


def attend(query_BHWd: Tensor, key_BHWd: Tensor, value_BHWd: Tensor, dropout: float, *, training: bool) -> Tensor:
    """Softmax attention of every token to every token; [B, H, W, D / H] each, and so is the result.

    No mask: padding is inside tokens, not among them, and a mask would rule out the flash kernel. In training alone
    weights are dropped, and the way to compute is the same with gradients and without: a pass without them, as over
    micro-batches, gives the values of the one with them.
    """
    if training and query_BHWd.device.type == "cpu" and query_BHWd.dtype == torch.bfloat16:
        # The backward of the CPU's fused kernel takes up to five times as long in bfloat16 as these products.
        query_BHWd = query_BHWd / math.sqrt(query_BHWd.shape[-1])
        weights_BHWW = F.softmax(query_BHWd @ key_BHWd.mT, dim=-1)
        return F.dropout(weights_BHWW, dropout) @ value_BHWd
    return F.scaled_dot_product_attention(query_BHWd, key_BHWd, value_BHWd, dropout_p=dropout if training else 0.0)


class FeedForward(nn.Module):
    """Two linear maps without biases, four times as wide between them, exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BWD: Tensor) -> Tensor:
        """[B, W, D] to [B, W, D]."""
        return self.down(F.gelu(self.up(x_BWD)))


class Block(nn.Module):
    """Pre-norm transformer block. Adds out of place: an in-place sum would lose the hooks of a sharded block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads, dropout)
        self.norm_2 = nn.LayerNorm(width, bias=False)
        self.feed_forward = FeedForward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BWD: Tensor) -> Tensor:
        """[B, W, D] to [B, W, D]."""
        x_BWD = x_BWD + self.dropout(self.attention(self.norm_1(x_BWD)))
        return x_BWD + self.dropout(self.feed_forward(self.norm_2(x_BWD)))


class ProjectionHead(nn.Module):
    """Projects a whole window to the vector that the contrastive loss compares; not used after training."""

    def __init__(self, window: int, latent_dim: int, projection_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(window * latent_dim, projection_dim, bias=False)
        self.norm_1 = nn.LayerNorm(projection_dim)
        self.linear_2 = nn.Linear(projection_dim, projection_dim, bias=False)
        self.norm_2 = nn.LayerNorm(projection_dim)

    def forward(self, z_BWL: Tensor) -> Tensor:
        """[B, W, L] to [B, P]; the published head ends in a ReLU too."""
        hidden_BP = F.relu(self.norm_1(self.linear_1(z_BWL.flatten(start_dim=1))))
        return F.relu(self.norm_2(self.linear_2(hidden_BP)))


class SANE(nn.Module):
    """Sequential autoencoder for neural embeddings.

    Train it through ``forward``: that is where sharding hooks in, and it never waits for the device. Under FSDP call
    ``fully_shard`` on each of ``blocks()`` and then on the model. Build large models under ``torch.device("meta")``,
    shard, ``to_empty`` and ``init_weights(seed)``: the values are those of one process, however they are sharded.

    Attributes:
        config: Shape of the model, resolved.
        preprocessing: How weights became the tokens it was trained on: ``{"token_size", "batch_norm",
            "parameters", "align", "architectures": {name: {"table": LayerTable.to_dict(), "normalization":
            Normalization.to_dict()}}}``, without the second to fourth if an earlier version made it; empty if unknown.
        provenance: Where the model comes from, such as its run, step and validation loss; empty if unknown.

    Raises:
        InputError: ``config`` is not resolved: no token size, or no sizes of learned position tables.
    """

    def __init__(self, config: AutoencoderConfig, *, seed: int = 0) -> None:
        super().__init__()
        if config.token_size == 0:
            raise InputError("config field autoencoder.token_size is 0: set it to the token size of the store")
        if config.positions == "learned" and not config.max_positions:
            raise InputError(
                "config field autoencoder.max_positions is empty: set it to LayerTable.position_sizes of the store, "
                "or to the largest of them"
            )
        self.config = config
        self.preprocessing: dict[str, Any] = {}
        self.provenance: dict[str, Any] = {}
        width, blocks = config.d_model, range(config.layers)
        self.positions: PositionEmbedding | SinusoidalPositions = (
            PositionEmbedding(config.max_positions, width)
            if config.positions == "learned"
            else SinusoidalPositions(width)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.token_in = nn.Linear(config.token_size, width)
        self.encoder = nn.ModuleList(Block(width, config.heads, config.dropout) for _ in blocks)
        self.to_latent = nn.Linear(width, config.latent_dim)
        self.from_latent = nn.Linear(config.latent_dim, width)
        self.decoder = nn.ModuleList(Block(width, config.heads, config.dropout) for _ in blocks)
        self.token_out = nn.Linear(width, config.token_size)
        self.projection_head = ProjectionHead(config.window, config.latent_dim, config.projection_dim)
        if not self.token_in.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Sets every parameter as the published code does, from the seed alone.

        Matrices and embeddings are N(0, 0.02), the last matrices of the residual branches N(0, 0.02 / sqrt(2 layers)),
        norm weights 1, biases 0. Each tensor is drawn whole on the CPU, so device and sharding change nothing.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            initial = torch.empty(parameter.shape, device="cpu")
            if parameter.dim() == 1:
                initial.fill_(0.0 if name.endswith(".bias") else 1.0)
            elif name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                initial.normal_(0.0, _INITIAL_STD / math.sqrt(2 * self.config.layers), generator=generator)
            else:
                initial.normal_(0.0, _INITIAL_STD, generator=generator)
            parameter.copy_(_sharded_like(initial.to(parameter.device), parameter))

    def forward(self, tokens_BWT: Tensor, positions_BW3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes, decodes and projects training windows; put both views of a window in one batch.

        Positions are not checked here: looking at their values would make the CPU wait for the device each step. One
        beyond its table is an IndexError on the CPU and a device-side assert elsewhere. The cheapest check is complete:
        compare ``LayerTable.position_sizes`` with ``config.max_positions`` once, before training.

        Args:
            tokens_BWT: Normalised tokens, ``config.window`` of them a window.
            positions_BW3: Token index, layer and channel, int32 or int64.

        Returns:
            Embeddings [B, W, L], reconstructed tokens [B, W, T], projections [B, P].

        Raises:
            InputError: W is not ``config.window``.
        """
        place_BWD = self.positions(positions_BW3)
        z_BWL = self._encode(tokens_BWT, place_BWD)
        return z_BWL, self._decode(z_BWL, place_BWD), self.project(z_BWL)

    def encode(self, tokens_BWT: Tensor, positions_BW3: Tensor) -> Tensor:
        """Embeds tokens in windows of any length, best of ``config.window``.

        Shapes are checked, and positions too: six numbers travel from the device, which only ``forward`` must avoid.

        Returns:
            Embeddings [B, W, L].

        Raises:
            InputError: The token size or the shape of the positions is wrong, or a position is beyond its table.
        """
        _check_shape("tokens", tokens_BWT, self.config.token_size, "autoencoder.token_size")
        self.check_positions(positions_BW3, tokens_BWT)
        return self._encode(tokens_BWT, self.positions(positions_BW3))

    def decode(self, z_BWL: Tensor, positions_BW3: Tensor) -> Tensor:
        """Turns embeddings back into tokens, in windows of any length; checks as ``encode`` does.

        Returns:
            Tokens [B, W, T]; what stands in their padding has no meaning.

        Raises:
            InputError: The size of the embeddings or the shape of the positions is wrong, or one is beyond its table.
        """
        _check_shape("embeddings", z_BWL, self.config.latent_dim, "autoencoder.latent_dim")
        self.check_positions(positions_BW3, z_BWL)
        return self._decode(z_BWL, self.positions(positions_BW3))

    def project(self, z_BWL: Tensor) -> Tensor:
        """Projects the embeddings of a training window for the contrastive loss.

        Returns:
            [B, P], none negative.

        Raises:
            InputError: W is not ``config.window``, for which the projection head is built.
        """
        if z_BWL.shape[1] != self.config.window:
            raise InputError(
                f"windows have {z_BWL.shape[1]} tokens, but the projection head is built for autoencoder.window = "
                f"{self.config.window}: cut windows of that length, or use encode and decode, which take any"
            )
        return self.projection_head(z_BWL)

    def check_positions(self, positions_BW3: Tensor, rows_BWX: Tensor) -> None:
        """Raises ``InputError`` unless there is one position for each row of [B, W, X], each within its table.

        Sinusoidal positions have no table: any that is not negative is one.
        """
        if positions_BW3.shape != (*rows_BWX.shape[:2], 3) or positions_BW3.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"positions are {positions_BW3.dtype} {list(positions_BW3.shape)}: they must be int32 or int64 "
                f"{[*rows_BWX.shape[:2], 3]}, the token index, layer and channel of each token"
            )
        if positions_BW3.numel() == 0:
            return
        extremes = torch.stack([positions_BW3.amin(dim=(0, 1)), positions_BW3.amax(dim=(0, 1))])
        lowest, highest = extremes.tolist()
        if min(lowest) < 0 and self.config.positions == "sinusoidal":
            raise InputError(f"positions: {min(lowest)} is negative: token index, layer and channel count from 0")
        sizes = self.config.max_positions if self.config.positions == "learned" else []
        for i, (name, size) in enumerate(zip(POSITION_NAMES, sizes, strict=False)):
            if lowest[i] < 0 or highest[i] >= size:
                wrong = lowest[i] if lowest[i] < 0 else highest[i]
                raise InputError(
                    f"positions: {name} {wrong} is not in 0..{size - 1}, the position table of this model: use a model "
                    f"with larger autoencoder.max_positions[{i}], trained on architectures of this size"
                )

    def blocks(self) -> list[nn.Module]:
        """All transformer blocks, encoder first: the units to shard, compile or recompute."""
        return [*self.encoder, *self.decoder]

    def flops_per_token(self, window: int) -> float:
        """Floating-point operations of one training step, forward and backward, per token of one view.

        ::

            6 N + 12 A D W,   N = 12 A D^2 + 2 D (T + L)

        N weights of the matrices that a token passes: 12 D^2 in each of the A = 2 ``config.layers`` blocks of encoder
        and decoder, and four maps in and out of them. Each takes a multiplication and an addition forward and twice as
        many backward. Attention to the W = ``window`` tokens of a window takes 4 D W a block forward, 8 D W backward.
        This times tokens of both views a second, divided by the device's dense peak, is the model FLOP/s utilisation.

        Left out are position tables, which are read and not multiplied; norms, biases, GELU and softmax, as usual; and
        the projection head, which takes 6 L P a token: 0.2 % of the `digits` preset, 0.0005 % of `resnet18`. What
        activation checkpointing computes again (2 N + 4 A D W less the outer maps, a third more) is no work of the
        model either, so it lowers the utilisation.
        """
        outside = [self.token_in, self.to_latent, self.from_latent, self.token_out]
        inside = [module for block in self.blocks() for module in block.modules() if isinstance(module, nn.Linear)]
        weights = sum(linear.weight.numel() for linear in outside + inside)
        return float(6 * weights + 12 * len(self.blocks()) * self.config.d_model * window)

    def save_pretrained(
        self,
        folder: str | Path,
        preprocessing: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors``, both or nothing.

        What a save to the same folder left beside it when it was killed is put back or deleted. Of a sharded model,
        gather the weights first (``get_model_state_dict`` with ``full_state_dict=True``) and load them with
        ``assign=True`` into a SANE built under ``torch.device("meta")``.

        Args:
            folder: Created; a model that is already there is replaced.
            preprocessing: How weights became tokens, JSON-able; left out, the model's own.
            provenance: Where the model comes from, JSON-able; left out, the model's own.

        Raises:
            InputError: ``folder`` holds other files, the model is sharded, or what is said of it is not JSON-able.
        """
        from safetensors.torch import save_file

        folder = Path(folder).resolve()
        _clear_up(folder)
        check_replaceable(folder)
        weights = self.state_dict()
        if any(_is_sharded(weight) for weight in weights.values()):
            raise InputError(f"model for {folder} is sharded over processes: gather its weights before saving")
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "autoencoder": dataclasses.asdict(self.config),
            "provenance": dict(self.provenance if provenance is None else provenance),
            "preprocessing": dict(self.preprocessing if preprocessing is None else preprocessing),
        }
        try:
            text = json.dumps(content, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"preprocessing or provenance cannot be written to {folder / CONFIG_FILE}: {error}"
            ) from error
        new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            new.mkdir(parents=True)
            (new / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
            save_file({name: weight.contiguous() for name, weight in weights.items()}, new / WEIGHTS_FILE)
            _move_into_place(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> SANE:
        """Reads a model that ``save_pretrained`` wrote, in evaluation mode.

        If that was killed just as it replaced the folder, the model before is read, with a warning.

        Args:
            folder: Folder of the model.
            device: Where its weights shall lie.

        Raises:
            InputError: The folder or a file is missing or damaged, of another format version, or weights do not fit.
        """
        folder = _or_replaced(Path(folder))
        config, preprocessing, provenance = _read_config(folder)
        weights = _read_weights(folder / WEIGHTS_FILE, device)
        with torch.device("meta"):
            model = cls(config)
        check_weights(weights, model.state_dict(), f"{folder / WEIGHTS_FILE}")
        model.load_state_dict(weights, assign=True)
        model.preprocessing, model.provenance = preprocessing, provenance
        return model.eval()

    @torch.no_grad()
    def encode_model(self, state_dict: Mapping[str, Tensor]) -> Tensor:
        """Embeds a network of an architecture the model was trained on, preprocessed as in its training.

        Windows have the training length; the last is shifted back to be full, and what it repeats is dropped. A network
        shorter than a window is one window of its own length.

        Args:
            state_dict: Weights of the network, in any order of keys.

        Returns:
            float32 [N, L] on the CPU: one embedding a token, in the order of the architecture's layer table.

        Raises:
            InputError: The model has no preprocessing, or the network fits none of its architectures.
        """
        table, normalization, tokens_NT = self._match(state_dict)
        tokens_NT, _ = normalization.normalize(tokens_NT, table)
        return self._over_windows(self.encode, tokens_NT, torch.from_numpy(table.positions))

    @torch.no_grad()
    def decode_model(self, z_NL: Tensor, reference: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Turns the embeddings of a network into weights: undoes ``encode_model``, up to reconstruction error.

        Args:
            z_NL: One embedding a token.
            reference: A network of the wanted architecture: gives dtypes, what is not tokenised (such as batch
                counters), and for ``l2`` normalisation the norms of the layers. Without it weights are float32, what is
                not tokenised is left out, norms are the mean of the training split, and the architecture is the only
                one with N tokens.

        Returns:
            State dict on the CPU.

        Raises:
            InputError: The model has no preprocessing, or no single architecture fits.
        """
        from sane_ray.tokens.tokenizer import detokenize  # needs numpy, which reading a model does not

        model_scale = None
        if reference is None:
            table, normalization = self._architecture_of_length(z_NL.shape[0])
        else:
            table, normalization, tokens_NT = self._match(reference)
            _, model_scale = normalization.normalize(tokens_NT, table)
        if table.num_tokens != z_NL.shape[0]:
            raise InputError(
                f"there are {z_NL.shape[0]} embeddings, but the reference network has {table.num_tokens} tokens: "
                "pass one of the architecture that was embedded"
            )
        tokens_NT = self._over_windows(self.decode, z_NL, torch.from_numpy(table.positions))
        return detokenize(normalization.denormalize(tokens_NT, table, model_scale), table, reference)

    def _encode(self, tokens_BWT: Tensor, place_BWD: Tensor) -> Tensor:
        x_BWD = self.dropout(self.token_in(tokens_BWT) + place_BWD)
        for block in self.encoder:
            x_BWD = block(x_BWD)
        return self.to_latent(x_BWD)

    def _decode(self, z_BWL: Tensor, place_BWD: Tensor) -> Tensor:
        x_BWD = self.dropout(self.from_latent(z_BWL) + place_BWD)
        for block in self.decoder:
            x_BWD = block(x_BWD)
        return self.token_out(x_BWD)

    def _over_windows(self, apply: Callable[[Tensor, Tensor], Tensor], rows_NX: Tensor, positions_N3: Tensor) -> Tensor:
        """Applies ``encode`` or ``decode`` to a whole network by windows, without dropout; float32 on the CPU."""
        weight, training = self.token_in.weight, self.training
        windows = Windows(rows_NX.shape[0], self.config.window)
        self.eval()
        try:
            parts = [
                apply(rows_NX[index_SW].to(weight), positions_N3[index_SW].to(weight.device)).float().cpu()
                for index_SW in windows.indices_SL.split(_WINDOWS_AT_ONCE)
            ]
        finally:
            self.train(training)
        return windows.join(torch.cat(parts))

    def _architectures(self) -> list[tuple[str, LayerTable, Normalization]]:
        from sane_ray.tokens.normalization import Normalization
        from sane_ray.tokens.tokenizer import LayerTable

        if not self.preprocessing.get("architectures"):
            raise InputError(
                "the model has no preprocessing, so it cannot know how weights became tokens: save it with "
                "save_pretrained(folder, preprocessing), or use encode and decode on tokens of your own"
            )
        return [
            (name, LayerTable.from_dict(entry["table"]), Normalization.from_dict(entry["normalization"]))
            for name, entry in self.preprocessing["architectures"].items()
        ]

    def _match(self, state_dict: Mapping[str, Tensor]) -> tuple[LayerTable, Normalization, Tensor]:
        """The architecture whose keys and shapes the state dict has, and its tokens, not yet normalised."""
        from sane_ray.tokens.tokenizer import tokenize

        reasons = []
        for name, table, normalization in self._architectures():
            try:
                return table, normalization, tokenize(state_dict, table).cpu()
            except InputError as error:
                reasons.append(f"{name} ({error})")
        raise InputError(
            f"the network fits none of the architectures the model was trained on: {'; '.join(reasons)}. If its file "
            "wraps or prefixes the weights, sane_ray.zoo.checkpoint.load_state_dict(path) gives them plain"
        )

    def _architecture_of_length(self, num_tokens: int) -> tuple[LayerTable, Normalization]:
        """The only architecture with so many tokens."""
        known = self._architectures()
        fitting = [(table, normalization) for _, table, normalization in known if table.num_tokens == num_tokens]
        if len(fitting) == 1:
            return fitting[0]
        names = ", ".join(f"{name} ({table.num_tokens} tokens)" for name, table, _ in known)
        found = "several architectures have" if fitting else "no architecture has"
        raise InputError(f"{found} {num_tokens} tokens; known are {names}: pass a reference network")


def check_names(found: Mapping[str, Any], wanted: Mapping[str, Any], source: str) -> None:
    """Raises ``InputError`` that names what ``found`` has too much or too little of, compared with ``wanted``."""
    for problem, names in (("lacks", wanted.keys() - found.keys()), ("has unknown", found.keys() - wanted.keys())):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise InputError(f"{source} {problem} {listed}: it belongs to another model or config")


def check_weights(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Raises ``InputError`` unless names and shapes of ``weights`` are those of ``wanted``."""
    check_names(weights, wanted, source)
    for name, weight in weights.items():
        if weight.shape != wanted[name].shape:
            raise InputError(
                f"{source}: {name} has shape {list(weight.shape)}, but the config makes it {list(wanted[name].shape)}: "
                "the config is of another model"
            )


def _check_shape(what: str, rows_BWX: Tensor, size: int, field: str) -> None:
    if rows_BWX.dim() != 3 or rows_BWX.shape[-1] != size:
        raise InputError(f"{what} have shape {list(rows_BWX.shape)}: it must be [windows, tokens, {size}] ({field})")


def _is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is spread over processes; without a process group it cannot be, and nothing is imported."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _sharded_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of ``whole`` that this process holds of ``parameter``, if that is sharded; no communication."""
    if not _is_sharded(parameter):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _read_config(folder: Path) -> tuple[AutoencoderConfig, dict[str, Any], dict[str, Any]]:
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise InputError(f"model {folder} {instead_of_model(folder)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: {folder} {instead_of_model(folder)}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): copy the model folder again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        if is_zoo(folder):
            raise InputError(f"model {folder} {instead_of_model(folder)}")
        raise InputError(f"{path} is not a sane_ray autoencoder: its format must be {FORMAT!r}; {WHERE}")
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version is {content.get('format_version')!r}, this sane_ray reads {FORMAT_VERSION}: "
            "install the version that wrote it"
        )
    fields = content.get("autoencoder")
    known = {field.name: field for field in dataclasses.fields(AutoencoderConfig)}
    if not isinstance(fields, dict):
        raise InputError(f"{path}: autoencoder is {fields!r}: it must hold the fields of the autoencoder's config")
    check_names(fields, known, f"{path}: autoencoder")
    preprocessing, provenance = (dict(content.get(name) or {}) for name in ("preprocessing", "provenance"))
    return AutoencoderConfig(**fields), preprocessing, provenance


def _read_weights(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: copy the model folder again") from error
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file, or cut short ({error}): copy it again") from error


def check_replaceable(folder: Path) -> None:
    """Raises ``InputError`` if writing a model at ``folder`` would destroy anything but a model."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder for the model")
    others = sorted({entry.name for entry in folder.iterdir()} - {CONFIG_FILE, WEIGHTS_FILE})
    if others:
        raise InputError(f"{folder} holds other files ({', '.join(others[:3])}): name a new folder for the model")


def _move_into_place(new: Path, folder: Path) -> None:
    """Puts a finished folder where it belongs; the model that was there goes only after the new one has its name."""
    if not folder.exists():
        new.rename(folder)
        return
    old = new.with_name(f"{new.name}.old")
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old)


def _clear_up(folder: Path) -> None:
    """Undoes what saving to the folder left unfinished: the model that was being replaced gets its name back."""
    replaced = _replaced(folder)
    if replaced and not folder.exists():
        replaced[-1].rename(folder)
    for left in _left_beside(folder):
        shutil.rmtree(left, ignore_errors=True)


def _or_replaced(folder: Path) -> Path:
    """The folder, or where it is missing, the model that was being replaced; not moved, as others may be saving."""
    replaced = [] if folder.exists() else _replaced(folder.resolve())
    if not replaced:
        return folder
    _LOG.warning("%s is missing, as saving a newer model to it was cut off: %s is read instead", folder, replaced[-1])
    return replaced[-1]


def _replaced(folder: Path) -> list[Path]:
    """Models that the folder held and that were not deleted, the newest last."""
    old = [left for left in _left_beside(folder) if left.suffix == ".old"]
    return sorted(old, key=lambda left: left.stat().st_mtime)


def _left_beside(folder: Path) -> list[Path]:
    """Folders beside this one that saving to it has made, and nobody else: their names and contents say so."""
    if not folder.parent.is_dir():
        return []
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}(\.old)?")
    left = [entry for entry in folder.parent.iterdir() if name.fullmatch(entry.name) and not entry.is_symlink()]
    ours = {CONFIG_FILE, WEIGHTS_FILE}
    return [entry for entry in left if entry.is_dir() and {inside.name for inside in entry.iterdir()} <= ours]
