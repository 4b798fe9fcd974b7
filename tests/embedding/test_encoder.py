"""Embeddings of tokens, layers and networks, against plain computations of the same."""

import json

import numpy as np
import pytest
import torch
from embedding_networks import SIZE, known_network, make_model
from safetensors.torch import load_file

from sane_ray.autoencoder.halo import Windows
from sane_ray.autoencoder.losses import explained_variance, explained_variance_sums
from sane_ray.autoencoder.model import SANE
from sane_ray.autoencoder.published import from_published
from sane_ray.config import AutoencoderConfig, EmbeddingConfig
from sane_ray.embedding import VECTORS, Embedder, encoder
from sane_ray.embedding.encoder import check_fits_model, choose_format, in_memory, window_and_halo
from sane_ray.errors import InputError
from sane_ray.hardware import has_bfloat16
from sane_ray.tokens.tokenizer import build_layer_table, tokenize

EXACT = {"precision": "float32"}


@pytest.fixture(scope="module")
def table(known_store):
    (architecture,) = known_store.architectures.values()
    return architecture.table


@pytest.fixture(scope="module")
def tokens(known_store):
    return torch.stack([known_store.tokens(checkpoint) for checkpoint in range(5)])


def test_by_default_a_network_is_embedded_as_the_model_itself_does(known_store):
    model = make_model(known_store)
    (architecture,) = known_store.architectures.values()
    weights = known_network(50)
    tokens, _ = architecture.normalization.normalize(tokenize(weights, architecture.table), architecture.table)
    z = Embedder(model, EmbeddingConfig(**EXACT), "cpu").encode(tokens[None], architecture.table)
    torch.testing.assert_close(z[0], model.encode_model(weights), rtol=1e-5, atol=1e-6)


def test_embeddings_are_those_of_the_published_encoder(parity):
    config = json.loads((parity / "meta.json").read_text())["autoencoder_config"]
    model = from_published(load_file(parity / "autoencoder.safetensors"), config)
    data = np.load(parity / "autoencoder_io.npz")
    places, embedder = torch.from_numpy(data["pos"]).int(), Embedder(model, EmbeddingConfig(**EXACT), "cpu")

    class Table:
        """Positions as in the parity data, of one sequence after the other."""

        def __init__(self, row):
            self.row = row

        def positions_of(self, start, stop):
            return places[self.row, start:stop].numpy()

    for row, window in enumerate(torch.from_numpy(data["x"]).float()):
        with torch.inference_mode():
            z, y = embedder._through(Windows(len(window), len(window)), window[None], Table(row))
        np.testing.assert_allclose(z[0].numpy(), data["z"][row], atol=1e-6)
        np.testing.assert_allclose(y[0].numpy(), data["y"][row], atol=1e-6)


def plain_shape(z):
    """The numbers of SHAPE of [n, L] by plain formulas."""
    lengths, centred = np.linalg.norm(z, axis=1), z - z.mean(0)
    variances = np.zeros(max(4, z.shape[1]))
    variances[: z.shape[1]] = np.sort(np.linalg.eigvalsh(centred.T @ centred / len(z)).clip(0))[::-1]
    shares = variances[variances > 1e-12] / max(variances.sum(), 1e-30)
    quantiles = np.quantile(lengths, [0.01, 0.25, 0.5, 0.75, 0.99])
    rank = np.exp(-(shares * np.log(shares)).sum())
    return [lengths.mean(), lengths.std(), *quantiles, np.linalg.norm(z.mean(0)), rank, *variances[:4]]


@pytest.mark.parametrize(("window", "halo", "at_once"), [(0, 0, 0), (4, 3, 0), (10, 0, 1), (0, 4, 25), (500, 0, 7)])
def test_summaries_are_what_plain_formulas_say_however_the_work_is_cut(
    known_store, table, tokens, window, halo, at_once
):
    model = make_model(known_store)
    config = EmbeddingConfig(window=window, halo=halo, tokens_at_once=at_once, **EXACT)
    embedder = Embedder(model, config, "cpu")
    kept = []
    summary = embedder.embed(in_memory(tokens), table, len(tokens), lambda first, z: kept.append((first, z)))
    windows = Windows(table.num_tokens, embedder.window, embedder.halo)
    with torch.no_grad():
        places = windows.cut(torch.from_numpy(table.positions))
        pairs = [(z := model.encode(windows.cut(one), places), model.decode(z, places)) for one in tokens]
    z = torch.stack([windows.join(one) for one, _ in pairs])
    decoded = torch.stack([windows.join(one) for _, one in pairs])
    assert [first for first, _ in kept] == np.cumsum([0, *(part.shape[1] for _, part in kept[:-1])]).tolist()
    torch.testing.assert_close(torch.cat([part for _, part in kept], dim=1), z, rtol=1e-5, atol=1e-6)

    groups = [slice(None), *(slice(*table.layer_starts[i : i + 2]) for i in range(len(table.layers)))]
    for number, rows in enumerate(groups):
        part = z[:, rows].double().numpy()
        expected = [part.mean(1), part.std(1), *np.quantile(part, [0.01, 0.25, 0.5, 0.75, 0.99], axis=1)]
        for name, values in zip(VECTORS, expected, strict=True):
            np.testing.assert_allclose(summary.vectors[name][:, number], values, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(summary.shape[:, number], [plain_shape(one) for one in part], rtol=2e-3, atol=2e-5)
        signal = torch.from_numpy(table.signal_counts[rows])
        for row in range(len(tokens)):
            sums = explained_variance_sums(decoded[row, rows][None], tokens[row, rows][None], signal[None])
            assert summary.explained_variance[row, number] == pytest.approx(
                float(explained_variance(sums)), rel=1e-4, nan_ok=True
            )
            assert summary.mse[row, number] == pytest.approx(float(sums[2] / sums[0]), rel=1e-4)


def test_padding_does_not_count_as_reconstruction_error(known_store, table, tokens):
    embedder = Embedder(make_model(known_store), EmbeddingConfig(**EXACT), "cpu")

    class Exact(SANE):
        def encode(self, tokens_BWT, positions_BW3):
            self.seen = tokens_BWT
            return tokens_BWT[..., :6]

        def decode(self, z_BWL, positions_BW3):
            signal = torch.from_numpy(table.signal_counts)[positions_BW3[..., 0].long(), None]
            return self.seen + 100 * (torch.arange(SIZE) >= signal)

    embedder.model = Exact(embedder.model.config)
    summary = embedder.embed(in_memory(tokens), table, len(tokens))
    assert summary.mse.max() == 0 and np.nanmin(summary.explained_variance) == 1


def test_without_reconstruction_nothing_is_decoded(known_store, table, tokens, monkeypatch):
    model = make_model(known_store)
    monkeypatch.setattr(model, "decode", lambda *_: pytest.fail("decoded"))
    summary = Embedder(model, EmbeddingConfig(reconstruction=False), "cpu").embed(in_memory(tokens), table, 5)
    assert summary.mse is None and summary.explained_variance is None


def test_quantiles_of_very_many_tokens_are_near_those_of_all(known_store, table, tokens, monkeypatch):
    model = make_model(known_store)
    config = EmbeddingConfig(tokens_at_once=30, **EXACT)
    exact = Embedder(model, config, "cpu").embed(in_memory(tokens), table, 5)
    monkeypatch.setattr(encoder, "EXACT_TOKENS", 12)
    sampled = Embedder(model, config, "cpu").embed(in_memory(tokens), table, 5)
    for name in ("mean", "std"):
        assert np.array_equal(exact.vectors[name], sampled.vectors[name])
    assert not np.array_equal(exact.vectors["q50"][:, 0], sampled.vectors["q50"][:, 0])
    small = [number for number, layer in enumerate(table.layers, start=1) if layer.num_tokens <= 12]
    assert np.array_equal(exact.vectors["q50"][:, small], sampled.vectors["q50"][:, small])


@pytest.mark.parametrize(("tokens", "count"), [(100, 12), (70_000, 65_536), (13, 12)])
def test_a_sample_is_spread_over_all_tokens_and_has_none_twice(tokens, count):
    chosen = encoder._spread(tokens, count)
    assert len(np.unique(chosen)) == count and chosen[0] >= 0 and chosen[-1] < tokens
    assert np.abs(chosen - np.arange(count) * tokens / count).max() <= tokens / count
    assert np.array_equal(chosen, encoder._spread(tokens, count))


def test_a_quantile_of_a_large_sample_is_off_by_little():
    values = np.random.default_rng(1).normal(size=500_000)
    sample = values[encoder._spread(len(values), encoder.EXACT_TOKENS)]
    for quantile in encoder.QUANTILES:
        assert (values < np.quantile(sample, quantile)).mean() == pytest.approx(quantile, abs=0.006)


def test_a_window_with_its_halo_is_as_long_as_in_training_unless_it_is_said():
    shape = AutoencoderConfig(window=32)
    assert window_and_halo(shape, EmbeddingConfig()) == (32, 0)
    assert window_and_halo(shape, EmbeddingConfig(halo=8)) == (16, 8)
    assert window_and_halo(shape, EmbeddingConfig(window=128, halo=64)) == (128, 64)
    with pytest.raises(InputError, match=r"embedding\.halo is 16: .*set it to 15 or less"):
        window_and_halo(shape, EmbeddingConfig(halo=16))


def test_bfloat16_is_chosen_where_it_is_native_and_changes_little(known_store, table, tokens):
    cpu = torch.device("cpu")
    assert choose_format("auto", cpu) == (torch.bfloat16 if has_bfloat16(cpu) else torch.float32)
    model = make_model(known_store)
    found = [
        Embedder(model, EmbeddingConfig(precision=name), "cpu").encode(tokens, table)
        for name in ("float32", "bfloat16")
    ]
    assert found[1].dtype == torch.float32 and not torch.equal(*found)
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_size": 25}, r"tokens have 24 values, but those of the model 25: .*--tokens.token_size 25"),
        (
            {"max_positions": [9, 9, 9]},
            r"needs .* positions of the token index, .*max_positions\[0\].* is 9.*sinusoidal",
        ),
        ({"max_positions": [99, 1, 99]}, r"positions of the layer, .*max_positions\[1\]"),
    ],
)
def test_a_network_that_does_not_fit_the_model_is_refused_with_the_remedy(table, settings, message):
    config = AutoencoderConfig(**{"token_size": SIZE, "max_positions": [99, 99, 99]} | settings)
    with pytest.raises(InputError, match=message):
        check_fits_model(table, config)


def test_sinusoidal_positions_fit_any_network():
    table = build_layer_table({"fc.weight": torch.zeros(9999, 3)}, token_size=SIZE)
    check_fits_model(table, AutoencoderConfig(token_size=SIZE, positions="sinusoidal"))
