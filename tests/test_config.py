import dataclasses

import pytest

from sane_ray.config import (
    PRESETS,
    AugmentationConfig,
    AutoencoderConfig,
    BuildZooJob,
    ClusterConfig,
    EmbeddingConfig,
    EmbedJob,
    LossConfig,
    PrepareJob,
    PretrainingConfig,
    PretrainJob,
    TokensConfig,
    ZooConfig,
    to_dict,
)
from sane_ray.errors import InputError

REFUSED = [
    (ZooConfig, "zoo", "models", 0),
    (ZooConfig, "zoo", "batch_size", 0),
    (ZooConfig, "zoo", "checkpoint_epochs", []),
    (ZooConfig, "zoo", "checkpoint_epochs", [2, 1]),
    (ZooConfig, "zoo", "checkpoint_epochs", [-1, 1]),
    (ZooConfig, "zoo", "learning_rates", [1e-2, 1e-3]),
    (ZooConfig, "zoo", "learning_rates", [0.0]),
    (ZooConfig, "zoo", "dropouts", [1.0]),
    (ZooConfig, "zoo", "activations", []),
    (TokensConfig, "tokens", "token_size", -1),
    (TokensConfig, "tokens", "split", [0.5, 0.5]),
    (TokensConfig, "tokens", "split", [0.5, 0.5, 0.5]),
    (TokensConfig, "tokens", "split", [0.0, 0.5, 0.5]),
    (TokensConfig, "tokens", "max_skipped", 1.5),
    (TokensConfig, "tokens", "max_architectures", 0),
    (TokensConfig, "tokens", "row_group_mb", 0.0),
    (TokensConfig, "tokens", "file_mb", 0.0),
    (AutoencoderConfig, "autoencoder", "token_size", -1),
    (AutoencoderConfig, "autoencoder", "window", 0),
    (AutoencoderConfig, "autoencoder", "d_model", 130),
    (AutoencoderConfig, "autoencoder", "max_positions", [10, 10]),
    (AutoencoderConfig, "autoencoder", "dropout", 1.0),
    (LossConfig, "loss", "gamma", 1.1),
    (LossConfig, "loss", "temperature", 0.0),
    (AugmentationConfig, "augmentation", "noise", -0.1),
    (PretrainingConfig, "pretraining", "epochs", 0),
    (PretrainingConfig, "pretraining", "learning_rate", 0.0),
    (PretrainingConfig, "pretraining", "seed", -1),
    (TokensConfig, "tokens", "seed", -1),
    (PretrainingConfig, "pretraining", "weight_decay", -1.0),
    (PretrainingConfig, "pretraining", "warmup", 1.0),
    (PretrainingConfig, "pretraining", "gradient_clip", -1.0),
    (PretrainingConfig, "pretraining", "shuffle_mb", 0.0),
    (PretrainingConfig, "pretraining", "checkpoints_kept", 0),
    (ClusterConfig, "cluster", "num_workers", 0),
    (ClusterConfig, "cluster", "cpus_per_worker", 0.0),
    (ClusterConfig, "cluster", "data_cpus", 0.0),
    (ClusterConfig, "cluster", "max_failures", -1),
    (EmbeddingConfig, "embedding", "window", -1),
    (EmbeddingConfig, "embedding", "halo", -1),
    (EmbeddingConfig, "embedding", "tokens_at_once", -1),
]


@pytest.mark.parametrize(("section", "name", "field", "value"), REFUSED)
def test_a_refused_value_is_named_with_its_dotted_field(section, name, field, value):
    if (name, field, value) == ("autoencoder", "d_model", 130):
        section = lambda **fields: AutoencoderConfig(heads=3, **fields)  # noqa: E731
    with pytest.raises(InputError, match=rf"config field {name}\.{field} is ") as refusal:
        section(**{field: value})
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".hidden", "it's", "two words"])
def test_a_run_name_is_the_name_of_a_folder(name):
    with pytest.raises(InputError, match="config field run_name is "):
        PretrainJob(run_name=name)
    assert PretrainJob(run_name="digits-2.1_b").run_name == "digits-2.1_b"


def test_every_worker_has_a_window_of_a_batch():
    assert PretrainJob(cluster=ClusterConfig(num_workers=5)).pretraining.batch_size == 32
    with pytest.raises(InputError, match=r"pretraining\.batch_size is 32: .*at least cluster\.num_workers = 33"):
        PretrainJob(cluster=ClusterConfig(num_workers=(2, 33)))


@pytest.mark.parametrize("num_workers", [0, (4, 2), (0, 2)])
def test_a_pair_of_workers_is_the_least_and_the_most(num_workers):
    with pytest.raises(InputError, match=r"cluster\.num_workers is .*a pair \[least, most\]"):
        ClusterConfig(num_workers=num_workers)
    config = ClusterConfig(num_workers=(2, 4))
    assert (config.min_workers, config.max_workers) == (2, 4)
    assert (ClusterConfig(num_workers=3).min_workers, ClusterConfig(num_workers=3).max_workers) == (3, 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [("checkpoints_kept", 1), ("micro_batch", -1), ("checkpoint_every", 0.0), ("spike_factor", 1.0)],
)
def test_values_that_training_cannot_use_are_refused(field, value):
    with pytest.raises(InputError, match=rf"pretraining\.{field} is {value}: must"):
        PretrainingConfig(**{field: value})


def test_the_published_presets_have_the_published_sizes():
    cnn, resnet18 = PRESETS["cnn"](), PRESETS["resnet18"]()
    shapes = [dataclasses.astuple(job.autoencoder)[1:6] for job in (cnn, resnet18)]
    assert shapes == [(64, 1024, 8, 8, 128), (256, 2048, 16, 8, 128)]
    assert (cnn.tokens.token_size, resnet18.tokens.token_size) == (289, 288)
    for job in (cnn, resnet18):
        optimisation = job.pretraining
        assert (optimisation.epochs, optimisation.batch_size) == (50, 32)
        assert (optimisation.learning_rate, optimisation.weight_decay) == (1e-4, 3e-9)
        assert (job.loss.gamma, job.loss.temperature, job.augmentation.noise) == (0.05, 0.1, 0.1)


@pytest.mark.parametrize("job", [BuildZooJob, PrepareJob, PretrainJob, EmbedJob])
def test_every_field_explains_itself(job):
    import ast
    import inspect

    def undocumented(config):
        tree = ast.parse(inspect.getsource(config)).body[0]
        fields = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
        after = {id(node): follower for node, follower in zip(tree.body, [*tree.body[1:], None], strict=True)}
        bare = [
            node.target.id
            for node in fields
            if not (isinstance(after[id(node)], ast.Expr) and isinstance(after[id(node)].value, ast.Constant))
        ]
        sections = {field.name: type(getattr(config(), field.name)) for field in dataclasses.fields(config)}
        sections = {name: kind for name, kind in sections.items() if dataclasses.is_dataclass(kind)}
        return [n for n in bare if n not in sections] + [n for kind in sections.values() for n in undocumented(kind)]

    assert undocumented(job) == []


def test_a_config_becomes_plain_nested_values():
    plain = to_dict(PretrainJob())
    assert plain["cluster"]["num_workers"] == 1
    assert plain["tokens"]["split"] == [0.7, 0.15, 0.15]
