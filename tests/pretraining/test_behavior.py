"""The behavioural loss knows networks by what they answer, and its gradient brings their answers closer."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AugmentationConfig, AutoencoderConfig, LossConfig, PretrainingConfig, TokensConfig
from sane_ray.errors import InputError
from sane_ray.pretraining.batch import FILLER, Batch
from sane_ray.pretraining.behavior import Behavior, check_behavior, cross_entropy, divergence, squared_difference
from sane_ray.pretraining.networks import answers, groups_of
from sane_ray.pretraining.step import METRICS, Trainer
from sane_ray.tokens.store.writing import write_store
from sane_ray.tokens.symmetry import permute, random_permutations
from sane_ray.tokens.tokenizer import detokenize, tokenize
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.catalog import discover

N = 52
"""Tokens of a network of the digits zoo."""
CPU = torch.device("cpu")


def make_behavior(store, seed=0, **loss):
    settings = {"behavior": 0.5, "query_count": 12} | loss
    return Behavior(store, LossConfig(**settings), window=N, device=CPU, seed=seed)


def make_batch(store, checkpoints, view_2=None):
    """Whole networks of a store as a batch; checkpoint -1 is filler."""
    size = store.token_size
    tokens = torch.stack([torch.zeros(N, size) if c == FILLER else store.tokens(c) for c in checkpoints])
    tables = [store.architecture_of(max(c, 0)).table for c in checkpoints]
    return Batch(
        view_1=tokens,
        view_2=tokens if view_2 is None else view_2,
        signal=torch.stack([torch.from_numpy(table.signal_counts) for table in tables]),
        positions=torch.stack([torch.from_numpy(table.positions) for table in tables]),
        slot=torch.tensor([FILLER if c == FILLER else i for i, c in enumerate(checkpoints)]),
        checkpoint=torch.tensor(checkpoints),
    )


def views_of(batch):
    return torch.cat([batch.view_1, batch.view_2]).float()


def disturbed(batch, size=0.3, seed=0):
    return views_of(batch) + size * torch.randn(2 * len(batch), N, batch.view_1.shape[2], generator=generator(seed))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def train_checkpoints(store):
    return [c for c, split in enumerate(store.models["split"].to_pylist()) if split == "train"]


@pytest.mark.parametrize("distance", ["l2", "kl"])
def test_equal_networks_have_distance_zero_and_others_do_not(store, distance):
    behavior = make_behavior(store, behavior_distance=distance)
    batch = make_batch(store, train_checkpoints(store))
    assert behavior(views_of(batch), batch, step=3).tolist() == [0.0] * 16
    assert (behavior(disturbed(batch), batch, step=3) > 1e-6).all()


def test_distances_are_those_of_networks_asked_one_by_one(store):
    """Written out for one row: load both networks, ask them the same queries, compare probabilities."""
    behavior = make_behavior(store, queries="noise")
    checkpoint = train_checkpoints(store)[2]
    batch = make_batch(store, [checkpoint])
    reconstructed = disturbed(batch)
    params = {k.removeprefix("config."): v for k, v in store.models.slice(checkpoint, 1).to_pylist()[0].items()}
    network = from_params(params).eval()
    queries = behavior._groups[behavior._group_of[checkpoint]].queries(np.random.default_rng((0, 7, 5)))
    architecture = store.architecture_of(checkpoint)
    probabilities = []
    for tokens in (batch.view_1[0], reconstructed[0]):
        weights = architecture.normalization.denormalize(tokens, architecture.table)
        network.load_state_dict(detokenize(weights, architecture.table))
        with torch.no_grad():
            probabilities.append(network(queries).softmax(-1))
    expected = (probabilities[0] - probabilities[1]).square().sum(-1).mean()
    assert float(behavior(reconstructed, batch, step=5)[0]) == pytest.approx(float(expected), rel=1e-4)


def test_distances_of_known_answers():
    expected, logits = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[np.log(3.0), 0.0]]])
    assert float(squared_difference(logits, expected)) == pytest.approx(2 * 0.25**2)
    assert float(cross_entropy(logits, expected)) == pytest.approx(-0.5 * np.log(0.75 * 0.25))
    assert float(cross_entropy(expected, expected)) == pytest.approx(np.log(2))
    p = np.sqrt(3) / (1 + np.sqrt(3))  # probability of the first class at temperature 2
    assert float(divergence(logits, expected)) == pytest.approx(-4 * 0.5 * np.log(4 * p * (1 - p)))


@pytest.mark.parametrize("distance", ["l2", "cross_entropy", "kl"])
def test_the_gradient_is_that_of_finite_differences(store, distance):
    behavior = make_behavior(store, behavior_distance=distance, queries="both")
    smooth = [c for c in train_checkpoints(store) if store.models["config.model::nlin"][c].as_py() != "relu"]
    batch = make_batch(store, smooth[:3])
    weights = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0, 3.0][: 2 * len(batch)])
    reconstructed = disturbed(batch, 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad((weights * behavior(reconstructed, batch, step=1)).sum(), reconstructed)
    direction = gradient / gradient.norm() + 0.1 * torch.randn(gradient.shape, generator=generator(1)) / N
    with torch.no_grad():
        ahead, behind = (
            (weights * behavior(reconstructed + sign * 0.02 * direction, batch, step=1)).sum() for sign in (1, -1)
        )
    assert float((ahead - behind) / 0.04) == pytest.approx(float((gradient * direction).sum()), rel=0.05)
    padding = torch.arange(store.token_size) >= batch.signal[..., None]
    assert (gradient[: len(batch)][padding] == 0).all()


def test_a_permuted_network_is_the_same_function(zoo, tmp_path):
    exact = TokensConfig(dtype="float32", normalization="none", split=[0.5, 0.25, 0.25])
    store = write_store(discover(zoo), tmp_path / "store", exact, source=zoo)
    checkpoints = train_checkpoints(store)[:3]
    permuted = []
    for checkpoint in checkpoints:
        architecture = store.architecture_of(checkpoint)
        order = random_permutations(architecture.symmetry, np.random.default_rng(checkpoint))
        permuted.append(
            tokenize(permute(store.state_dict(checkpoint), architecture.symmetry, order), architecture.table)
        )
    batch = make_batch(store, checkpoints)
    behavior = make_behavior(store)
    swapped = torch.cat([torch.stack(permuted), batch.view_1])
    assert not torch.equal(swapped, views_of(batch))
    assert behavior(swapped, batch, step=0).max() < 1e-9
    assert behavior(swapped + 0.1, batch, step=0).min() > 1e-6


@pytest.mark.parametrize("normalization", ["l2", "minmax"])
def test_every_normalization_is_undone(zoo, tmp_path, normalization):
    tokens = TokensConfig(dtype="float32", normalization=normalization, split=[0.5, 0.25, 0.25])
    store = write_store(discover(zoo), tmp_path / "store", tokens, source=zoo)
    checkpoints = train_checkpoints(store)
    behavior = make_behavior(store)
    for checkpoint in checkpoints:
        networks = behavior._groups[behavior._group_of[checkpoint]]
        scale = behavior._scale_of(np.array([checkpoint]))
        weights = networks.decode(store.tokens(checkpoint)[None], scale)
        for key, value in store.state_dict(checkpoint).items():
            assert torch.allclose(weights[key][0], value, rtol=1e-6, atol=1e-7)


def test_filler_counts_nothing(store):
    behavior = make_behavior(store)
    some = train_checkpoints(store)[:2]
    batch, padded = make_batch(store, some), make_batch(store, [*some, FILLER])
    alone = behavior(disturbed(batch), batch, step=0)
    rows = [0, 1, 3, 4]
    reconstructed = torch.full((6, N, store.token_size), float("nan"))
    reconstructed[rows] = disturbed(batch)
    reconstructed.requires_grad_()
    together = behavior(reconstructed, padded, step=0)
    assert torch.allclose(together[rows], alone) and together[[2, 5]].tolist() == [0.0, 0.0]
    together.sum().backward()
    assert reconstructed.grad.isfinite().all() and (reconstructed.grad[[2, 5]] == 0).all()
    assert reconstructed.grad[rows].abs().amax(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e38])
def test_a_network_whose_answers_are_not_finite_counts_zero_and_spoils_no_gradient(store, broken):
    behavior = make_behavior(store)
    batch = make_batch(store, train_checkpoints(store)[:4])
    reconstructed = disturbed(batch)
    whole = behavior(reconstructed, batch, step=0)
    reconstructed[3] = broken
    reconstructed.requires_grad_()
    distances = behavior(reconstructed, batch, step=0)
    distances.sum().backward()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert distances[3] == 0 and torch.equal(distances[others], whole[others])
    assert reconstructed.grad.isfinite().all() and (reconstructed.grad[3] == 0).all()


def test_half_precision_goes_in_and_its_gradient_comes_out(store):
    behavior = make_behavior(store)
    batch = make_batch(store, train_checkpoints(store)[:2])
    reconstructed = disturbed(batch).bfloat16().requires_grad_()
    distances = behavior(reconstructed, batch, step=0)
    assert torch.equal(distances.detach(), behavior(reconstructed.detach().float(), batch, step=0))
    distances.sum().backward()
    assert reconstructed.grad.dtype == torch.bfloat16 and reconstructed.grad.abs().max() > 0


def test_queries_depend_on_seed_and_step_alone(store):
    checkpoints = train_checkpoints(store)
    batch = make_batch(store, checkpoints)
    reconstructed = disturbed(batch)
    whole = make_behavior(store)(reconstructed, batch, step=4)
    half = make_behavior(store)  # as another worker, or one that was started anew, with some of the rows
    rows = [*range(2, 6), *range(10, 14)]
    assert torch.equal(half(reconstructed[rows], batch.rows(2, 6), step=4), whole[rows])
    assert not torch.equal(half(reconstructed, batch, step=5), whole)
    assert not torch.equal(make_behavior(store, seed=1)(reconstructed, batch, step=4), whole)


@pytest.mark.parametrize(("queries", "images"), [("images", 12), ("noise", 0), ("both", 6)])
def test_queries_are_training_images_noise_or_both(store, queries, images):
    group = make_behavior(store, queries=queries)._groups[0]
    drawn = group.queries(np.random.default_rng(0))
    assert drawn.shape == (12, 1, 8, 8) and drawn.dtype == torch.float32
    training = {image.tobytes() for image in groups_of(store, [0])[0].images().split("train")[0]}
    assert [query.numpy().tobytes() in training for query in drawn] == [True] * images + [False] * (12 - images)
    assert len({query.numpy().tobytes() for query in drawn}) == 12


def test_more_queries_than_images_repeat_some(store):
    group = make_behavior(store, query_count=3000)._groups[0]
    assert len(group.queries(np.random.default_rng(0))) == 3000


def test_networks_answer_together_as_they_do_one_by_one(store):
    from sane_ray.pretraining import networks

    group = groups_of(store, train_checkpoints(store))[0]
    network = group.network()
    weights = {
        key: 0.1 * torch.randn(3, *value.shape, generator=generator(0)) for key, value in network.state_dict().items()
    }
    queries = torch.randn(5, 1, 8, 8, generator=generator(1))
    together, apart = networks._together(network, weights, queries), networks._one_by_one(network, weights, queries)
    assert apart.shape == (3, 5, 10)
    assert torch.allclose(together, apart, rtol=1e-4, atol=1e-4)
    assert torch.equal(answers(network, weights, queries), apart)


def train_on(store, batch, behavior_weight, steps=60):
    """An autoencoder trained on one batch, with a behavioural loss or without; its distance to the originals."""
    (architecture,) = store.architectures.values()
    sizes = {"token_size": store.token_size, "max_positions": list(architecture.table.position_sizes)}
    model = SANE(AutoencoderConfig(window=N, d_model=32, heads=2, layers=1, latent_dim=16, **sizes), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    behavior = make_behavior(store, query_count=32, behavior_distance="kl")
    target = views_of(batch)
    mask = torch.arange(store.token_size) < batch.signal.repeat(2, 1)[..., None]
    for step in range(steps):
        reconstructed = model(target, batch.positions.repeat(2, 1, 1))[1]
        error = ((reconstructed - target).square() * mask).sum() / mask.sum()
        loss = (1 - behavior_weight) * error
        if behavior_weight:
            loss = loss + behavior_weight * behavior(reconstructed, batch, step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        reconstructed = model(target, batch.positions.repeat(2, 1, 1))[1]
        asked = make_behavior(store, seed=99, query_count=200)  # queries that training has not seen
        return float(asked(reconstructed, batch, step=0).mean())


def test_training_with_it_brings_answers_closer_than_training_without(store):
    trained = [c for c in train_checkpoints(store) if store.models["epoch"][c].as_py() == 1]
    batch = make_batch(store, trained)
    assert train_on(store, batch, 0.5) < 0.7 * train_on(store, batch, 0.0)


def test_a_loss_without_it_is_not_checked(store):
    check_behavior(store, LossConfig(), window=20)
    check_behavior(store, LossConfig(behavior=0.5), window=N)


def refused(store, window=N, **loss):
    settings = {"behavior": 0.5} | loss
    with pytest.raises(InputError) as caught:
        check_behavior(store, LossConfig(**settings), window=window)
    with pytest.raises(InputError):
        Behavior(store, LossConfig(**settings), window=window, device=CPU)
    return str(caught.value)


def with_column(store, name, values):
    column = store.models.column_names.index(name)
    return dataclasses.replace(store, models=store.models.set_column(column, name, pa.array(values)))


def test_windows_that_are_not_whole_networks_are_refused(store):
    message = refused(store, window=20)
    assert "autoencoder.window is 20" in message and "set --autoencoder.window 52" in message


def test_networks_of_several_lengths_are_refused(store):
    (architecture,) = store.architectures.values()
    table = dataclasses.replace(architecture.table, layers=architecture.table.layers[:-1])
    other = dataclasses.replace(architecture, name="other", table=table)
    several = dataclasses.replace(store, architectures={**store.architectures, "other": other})
    message = refused(several)
    assert "42 (other)" in message and "networks of one length" in message and "--loss.behavior 0" in message


def test_a_store_that_does_not_say_what_its_networks_are_is_refused(store):
    names = [name for name in store.models.column_names if not name.startswith("config.")]
    message = refused(dataclasses.replace(store, models=store.models.select(names)))
    assert "model::type" in message and "params.json" in message and "--loss.behavior 0" in message
    assert "leaky" in refused(with_column(store, "config.model::nlin", ["leaky"] * len(store.models)))


def test_networks_that_are_not_wholly_stored_are_refused(store):
    sizes = with_column(store, "config.model::o_dim", [7] * len(store.models))
    assert "shape [10, 24] in the store and of shape [7, 24] in a network" in refused(sizes)


def test_images_that_are_not_at_hand_are_refused_and_noise_is_the_way_out(store):
    for name, values in (("name", ["a_zoo_of_mine"]), ("fingerprint", ["0"]), ("name", [None])):
        missing = with_column(store, f"config.dataset::{name}", values * len(store.models))
        message = refused(missing)
        assert "loss.queries is 'images'" in message and "set it to noise" in message
        check_behavior(missing, LossConfig(behavior=0.5, queries="noise"), window=N)
        assert "'both'" in refused(missing, queries="both")


def test_images_of_another_shape_are_refused(store):
    taller = with_column(store, "config.model::image_height", [9] * len(store.models))  # the flat layer is as wide
    assert "have shape [1, 8, 8], and the networks take [1, 9, 8]" in refused(taller)


def test_l2_without_norms_is_refused(zoo, tmp_path):
    tokens = TokensConfig(normalization="l2", split=[0.5, 0.25, 0.25])
    store = write_store(discover(zoo), tmp_path / "store", tokens, source=zoo)
    check_behavior(store, LossConfig(behavior=0.5), window=N)
    bare = dataclasses.replace(store, models=store.models.drop_columns(["model_scale"]))
    assert "model_scale" in refused(bare) and "--loss.behavior 0" in refused(bare)


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_the_trainer_takes_it_as_it_is(store, micro_batch):
    (architecture,) = store.architectures.values()
    sizes = {"token_size": store.token_size, "max_positions": list(architecture.table.position_sizes)}
    trainer = Trainer(
        AutoencoderConfig(window=N, d_model=16, heads=2, layers=1, latent_dim=8, **sizes),
        LossConfig(behavior=0.5),
        AugmentationConfig(noise=0.0),
        PretrainingConfig(precision="float32", micro_batch=micro_batch),
        steps=10,
        device=CPU,
        behavior=make_behavior(store),
    )
    checkpoints = train_checkpoints(store)[:5]
    batch, padded = make_batch(store, checkpoints), make_batch(store, [*checkpoints, FILLER])
    with torch.no_grad():
        reconstructed = trainer.model.eval()(views_of(batch), batch.positions.repeat(2, 1, 1))[1]
    expected = float(make_behavior(store)(reconstructed, batch, step=0).mean())
    assert float(trainer.step(padded)[METRICS.index("loss_behavior")]) == pytest.approx(expected, rel=1e-4)
    first = trainer.validate([batch])["val/loss_behavior"]
    for _ in range(8):
        trainer.step(padded)
    assert trainer.validate([batch])["val/loss_behavior"] < first
