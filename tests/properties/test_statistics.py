import numpy as np
import pytest
import torch

from sane_ray.properties.statistics import published_statistics, tensor_statistics
from sane_ray.properties.tensors import batches


def published_formula(tokens: torch.Tensor, layer_of_token: np.ndarray) -> np.ndarray:
    """LayerQuintiles as the paper and its code say, one checkpoint and layer at a time, in float64."""
    features = []
    for layer in np.unique(layer_of_token):
        values = tokens[layer_of_token == layer].double().flatten()
        quantiles = torch.quantile(values, torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99], dtype=torch.float64))
        features += [values.mean(), values.var(unbiased=False), *quantiles]
    return np.array([float(value) for value in features])


def gathered(store, compute, **options):
    rows = {}
    for batch in batches(store, **options):
        names, values = compute(batch)
        assert values.shape == (len(batch.checkpoints), len(names))
        rows |= dict(zip(batch.checkpoints, values, strict=True))
    return names, rows


def test_published_statistics_are_the_published_formula(store):
    names, rows = gathered(store, published_statistics)
    assert sorted(rows) == list(range(len(store.models))) and len(names) == 7 * 2
    for checkpoint in (0, 7, 59):
        table = store.architecture_of(checkpoint).table
        expected = published_formula(store.tokens(checkpoint), table.layer_of_token)
        np.testing.assert_allclose(rows[checkpoint], expected, atol=1e-6, rtol=1e-6)


def test_tensor_statistics_are_of_the_weights_as_they_were(store):
    names, rows = gathered(store, tensor_statistics)
    for checkpoint in (1, 30):
        found = dict(zip(names, rows[checkpoint], strict=True))
        for key, tensor in store.state_dict(checkpoint).items():
            values = tensor.double().numpy().ravel()
            column = f"{key[0]}.weight/{key.partition('.')[2]} "
            assert found[column + "mean"] == pytest.approx(values.mean(), abs=1e-6)
            assert found[column + "variance"] == pytest.approx(values.var(), abs=1e-6)
            for q in (0, 25, 50, 75, 100):
                assert found[f"{column}p{q:02d}"] == pytest.approx(np.percentile(values, q), abs=1e-6)


@pytest.mark.parametrize("mode", ["l2", "none", "minmax"])
def test_tensors_undo_every_normalisation(zoos, tmp_path, mode):
    store = zoos.write(tmp_path / "store", zoos.write_zoo(tmp_path / "zoo", models=4), normalization=mode)
    for batch in batches(store, batch_bytes=1):
        assert len(batch.checkpoints) == 1
        weights = store.state_dict(batch.checkpoints[0])
        for layer, weight, bias in batch.tensors():
            np.testing.assert_allclose(weight[0].reshape(layer.shape), weights[layer.key], atol=1e-6)
            np.testing.assert_allclose(bias[0], weights[layer.bias_key], atol=1e-6)


def test_batches_do_not_change_the_result(store):
    whole, single = gathered(store, tensor_statistics)[1], gathered(store, tensor_statistics, batch_bytes=1)[1]
    assert whole.keys() == single.keys()
    assert all(np.array_equal(whole[row], single[row]) for row in whole)
