import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from sane_ray.errors import InputError
from sane_ray.tokens.normalization import LayerStatistics, Moments, Normalization, fit, merge, moments, scale_of
from sane_ray.tokens.tokenizer import build_layer_table, tokenize

LAYOUTS = ("sparse", "dense", "mixed")
MODES = ("standardize", "minmax", "l2", "none")


def network(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 7), nn.Linear(7, 3, bias=False)
    )
    for _ in range(3):
        model(torch.randn(6, 1, 4, 4) + seed)
    return model.state_dict()


STATE_DICTS = [network(seed) for seed in range(4)]
TABLE = build_layer_table(STATE_DICTS[0], token_size=8)
TOKENS = [tokenize(state_dict, TABLE) for state_dict in STATE_DICTS]
PADDING = torch.arange(8) >= torch.from_numpy(TABLE.signal_counts)[:, None]


def seen(tokens=TOKENS, table=TABLE):
    statistics = LayerStatistics()
    for model in tokens:
        statistics.update(model, table)
    return statistics


def values(model, layer):
    """All values [w | b] of a layer of a model, read from its state dict and not from tokens."""
    state_dict = STATE_DICTS[model]
    parts = [state_dict[layer.key]] + ([state_dict[layer.bias_key]] if layer.bias_key else [])
    return torch.cat([part.double().flatten() for part in parts])


def signal(tokens, index):
    """The values of a layer of TABLE, without padding."""
    chosen = torch.from_numpy(TABLE.layer_of_token) == index
    return tokens[chosen][~PADDING[chosen]]


@pytest.mark.parametrize("models", [1, 4])
def test_standardize_is_the_mean_of_means_and_the_root_of_the_mean_variance(models):
    normalization = fit(seen(TOKENS[:models]), "standardize")
    for index, layer in enumerate(TABLE.layers):
        data = [values(model, layer) for model in range(models)]
        shift = np.mean([x.mean() for x in data])
        scale = np.sqrt(np.mean([x.var(unbiased=True) for x in data]))
        assert normalization.shift[index] == pytest.approx(shift, rel=1e-12)
        assert normalization.scale[index] == pytest.approx(scale, rel=1e-12)
        expected = (data[0] - shift) / scale
        normal, _ = normalization.normalize(TOKENS[0], TABLE)
        assert signal(normal, index).double().sort()[0].numpy() == pytest.approx(expected.sort()[0].numpy(), abs=1e-5)


def test_running_statistics_are_normalised_once_like_any_layer():
    index = [layer.key for layer in TABLE.layers].index("1.running_mean")
    normalization = fit(seen(), "standardize")
    normal, _ = normalization.normalize(TOKENS[2], TABLE)
    expected = (values(2, TABLE.layers[index]) - normalization.shift[index]) / normalization.scale[index]
    assert torch.allclose(signal(normal, index).double(), expected, atol=1e-5)


def test_minmax_maps_the_extremes_of_all_models_to_minus_one_and_one():
    normalization = fit(seen(), "minmax")
    normal = [normalization.normalize(tokens, TABLE)[0] for tokens in TOKENS]
    for index, layer in enumerate(TABLE.layers):
        data = torch.stack([values(model, layer) for model in range(4)])
        found = torch.stack([signal(tokens, index) for tokens in normal])
        if data.min() < data.max():
            expected = (data - data.min()) / (data.max() - data.min()) * 2 - 1
            assert torch.allclose(found.double().sort(dim=1)[0], expected.sort(dim=1)[0], atol=1e-5)
            assert found.min() == pytest.approx(-1, abs=1e-6) and found.max() == pytest.approx(1, abs=1e-6)


def test_l2_divides_each_layer_by_its_own_norm_and_returns_the_norms():
    normalization = fit(seen(), "l2")
    for model, tokens in enumerate(TOKENS):
        normal, scale = normalization.normalize(tokens, TABLE)
        assert scale.dtype == torch.float32
        for index, layer in enumerate(TABLE.layers):
            norm = values(model, layer).norm()
            if norm > 0:
                assert scale[index].item() == pytest.approx(norm.item(), rel=1e-6)
                assert signal(normal, index).norm().item() == pytest.approx(1, rel=1e-5)
    means = [np.mean([values(model, layer).norm() for model in range(4)]) for layer in TABLE.layers]
    assert normalization.scale == pytest.approx([mean if mean > 0 else 1 for mean in means], rel=1e-12)


def test_l2_without_a_models_own_norms_uses_the_mean_norms():
    normalization = fit(seen(), "l2")
    normal, _ = normalization.normalize(TOKENS[0], TABLE)
    restored = normalization.denormalize(normal, TABLE)
    assert signal(restored, 0).norm().item() == pytest.approx(normalization.scale[0], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_denormalize_undoes_normalize_and_padding_stays_exactly_zero(mode):
    normalization = fit(seen(), mode)
    for tokens in TOKENS:
        before = tokens.clone()
        normal, scale = normalization.normalize(tokens, TABLE)
        restored = normalization.denormalize(normal, TABLE, scale)
        assert torch.equal(tokens, before)
        assert torch.allclose(restored, tokens, rtol=1e-6, atol=1e-6)
        for result in (normal, restored):
            assert torch.equal(result[PADDING].view(torch.int32), torch.zeros(int(PADDING.sum()), dtype=torch.int32))
        assert (scale is None) == (mode != "l2")
    assert torch.equal(normalization.normalize(TOKENS[0], TABLE)[0], TOKENS[0]) == (mode == "none")


@pytest.mark.parametrize("mode", MODES)
def test_decoded_padding_does_not_reach_the_weights(mode):
    normalization = fit(seen(), mode)
    noisy = torch.randn_like(TOKENS[0]).bfloat16()
    restored = normalization.denormalize(noisy, TABLE)
    assert restored.dtype == torch.float32 and not restored[PADDING].any() and restored[~PADDING].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3e4, 1e-41])
def test_layers_without_spread_stay_finite_and_invertible(mode, constant):
    state_dict = {"a.weight": torch.full((3, 7), constant), "b.weight": torch.full((1, 1), constant)}
    state_dict["c.weight"] = torch.randn(2, 2)
    table = build_layer_table(state_dict)
    tokens = tokenize(state_dict, table)
    normalization = fit(seen([tokens], table), mode)
    normal, scale = normalization.normalize(tokens, table)
    assert normal.isfinite().all() and (normalization.scale > 0).all()
    assert torch.allclose(normalization.denormalize(normal, table, scale), tokens, rtol=1e-6, atol=1e-7)
    if mode in ("standardize", "minmax"):  # an unseen model must not be blown up by a spread of nothing
        other, _ = normalization.normalize(tokens + 1, table)
        assert other[:3].abs().max() <= 1.01


def of_tensors(state_dict):
    """The moments of each tensor, read in two slices."""
    found = {}
    for key, value in state_dict.items():
        flat = value.reshape(-1)
        found[key] = merge(moments(flat[: len(flat) // 2]), moments(flat[len(flat) // 2 :]))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("count", [1, 2, 1000, 131_072, 400_001])
def test_moments_are_those_of_the_values_in_float64(dtype, count):
    torch.manual_seed(count)
    values = (torch.randn(count, dtype=torch.float64) + 3).to(dtype)
    before, exact = values.clone(), values.double()
    found = moments(values)
    assert found.count == count
    mean = math.fsum(exact.tolist()) / count
    m2 = math.fsum((exact - mean).square().tolist())
    assert found.mean == pytest.approx(mean, rel=1e-13)
    assert found.m2 == pytest.approx(m2, rel=1e-12)
    assert found.variance == pytest.approx(m2 / (count - 1) if count > 1 else 0.0, rel=1e-12)
    assert found.norm == pytest.approx(math.sqrt(math.fsum(exact.square().tolist())), rel=1e-12)
    assert (found.low, found.high) == (exact.min().item(), exact.max().item())
    assert torch.equal(values.double(), before.double())  # read, not written
    cut = count // 3
    merged = merge(moments(values[:cut]), moments(values[cut:]))
    for name in ("count", "mean", "m2", "low", "high"):
        assert getattr(merged, name) == pytest.approx(getattr(found, name), rel=1e-12)


def test_moments_of_a_large_offset_lose_no_digits():
    values = torch.tensor([1e8 + 1, 1e8 + 2, 1e8 + 3, 1e8 + 4], dtype=torch.float64).repeat(100_000)
    assert moments(values).variance == pytest.approx(1.25 * 400_000 / 399_999, rel=1e-9)


def test_moments_of_nothing_are_neutral():
    some = moments(torch.randn(2, 3))
    assert merge(Moments(), some) == merge(some, moments(torch.empty(0))) == some


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 5, 299_999])
def test_one_value_that_is_not_finite_shows_in_the_moments(bad, place):
    values = torch.randn(300_000)
    values[place] = bad
    for found in (moments(values), merge(moments(values[:1000]), moments(values[1000:]))):
        assert not np.isfinite([found.low, found.high]).all() and not np.isfinite(found.mean)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_from_moments_of_tensors_are_those_of_tokens(layout):
    table = build_layer_table(STATE_DICTS[0], token_size=8, layout=layout)
    of_tokens, added = LayerStatistics(), LayerStatistics()
    for state_dict in STATE_DICTS:
        of_tokens.update(tokenize(state_dict, table), table)
        added.add({**of_tensors(state_dict), "unknown": Moments()}, table)
    for name, value in of_tokens.to_dict().items():
        assert added.to_dict()[name] == pytest.approx(value, rel=1e-12, abs=1e-300)
    assert of_tokens.to_dict()["mean"] == pytest.approx(seen().to_dict()["mean"], rel=1e-12)  # whatever the layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_ranges_are_normalised_like_the_whole_model_in_place_or_not(mode, layout):
    table = build_layer_table(STATE_DICTS[0], token_size=8, layout=layout)
    tokens = tokenize(STATE_DICTS[1], table)
    normalization = fit(LayerStatistics().update(tokens, table), mode)
    whole, scale = normalization.normalize(tokens, table)
    for start, stop in itertools.combinations(range(0, table.num_tokens + 1, 3), 2):
        used = tokens[start:stop].clone()
        part, same = normalization.normalize(used, table, start, scale, out=used)
        assert part is used and same is scale and torch.equal(part, whole[start:stop])
        restored = normalization.denormalize(part, table, scale, start)
        assert torch.equal(restored, normalization.denormalize(whole, table, scale)[start:stop])
        padding = torch.arange(8) >= torch.from_numpy(table.signal_of(start, stop))[:, None]
        noisy = normalization.denormalize(torch.randn_like(part), table, scale, start)
        for result in (part, restored, noisy):
            assert not result[padding].view(torch.int32).any()  # not even a negative zero
    empty = torch.empty(0, 8)
    assert normalization.normalize(empty, table, 2, scale)[0].shape == (0, 8)
    assert normalization.denormalize(empty, table, scale, 2).shape == (0, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_l2_scale_of_a_model_is_known_without_its_tokens(layout):
    state_dict = {**STATE_DICTS[2], "zero.weight": torch.zeros(3, 3)}
    table = build_layer_table(state_dict, token_size=8, layout=layout)
    tokens = tokenize(state_dict, table)
    normalization = fit(LayerStatistics().update(tokens, table), "l2")
    scale = scale_of(of_tensors(state_dict), table)
    assert scale.dtype == torch.float32 and scale[-1] == 1
    assert torch.allclose(scale, normalization.normalize(tokens, table)[1], rtol=1e-6)


def test_decoded_tokens_carry_gradients_through_denormalize_but_not_their_padding():
    normalization = fit(seen(), "standardize")
    tokens = torch.randn(TABLE.num_tokens, 8, requires_grad=True)
    normalization.denormalize(tokens, TABLE).sum().backward()
    expected = torch.from_numpy(normalization.scale[TABLE.layer_of_token]).float()[:, None].expand(-1, 8)
    assert torch.allclose(tokens.grad, expected.masked_fill(PADDING, 0.0))


def test_merged_statistics_equal_one_pass_in_any_order():
    once = seen().to_dict()
    for order in itertools.permutations(range(4)):
        first, second = seen([TOKENS[order[0]]]), seen([TOKENS[index] for index in order[1:]])
        merged = LayerStatistics().merge(first).merge(LayerStatistics()).merge(second).to_dict()
        assert merged["models"] == once["models"] == 4
        for name in once:
            assert merged[name] == pytest.approx(once[name], rel=1e-14)
        assert second.models == 3 and second.to_dict() == seen([TOKENS[index] for index in order[1:]]).to_dict()


def test_statistics_and_normalization_survive_plain_dicts():
    statistics = seen()
    again = LayerStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert again.to_dict() == statistics.to_dict()
    assert LayerStatistics.from_dict(LayerStatistics().to_dict()).merge(statistics).to_dict() == statistics.to_dict()
    for mode in MODES:
        normalization = fit(statistics, mode)
        restored = Normalization.from_dict(json.loads(json.dumps(normalization.to_dict())))
        assert restored == normalization == fit(again, mode)
    assert fit(statistics, "standardize") != fit(statistics, "minmax")


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="training split is empty"):
        fit(LayerStatistics(), "standardize")
    with pytest.raises(InputError, match="'zscore'"):
        fit(seen(), "zscore")
    small = build_layer_table({"a.weight": torch.zeros(2, 3)})
    with pytest.raises(InputError, match="1 layers cannot be merged into those of 6"):
        seen().update(torch.zeros(2, 3), small)
    normalization = fit(seen(), "standardize")
    with pytest.raises(InputError, match="does not fit a table of 1"):
        normalization.normalize(torch.zeros(2, 3), small)
    with pytest.raises(InputError, match="tokens of size 8"):
        normalization.denormalize(torch.zeros(2, 3), TABLE)
    with pytest.raises(InputError, match="tokens of size 8"):
        LayerStatistics().update(torch.zeros(2, 3), TABLE)
    with pytest.raises(InputError, match=r"from token 1, but the architecture has 49 tokens"):
        normalization.normalize(TOKENS[0], TABLE, 1)
    with pytest.raises(InputError, match="from token -1"):
        normalization.denormalize(TOKENS[0][:3], TABLE, start=-1)
    with pytest.raises(InputError, match="statistics need all 49 tokens of a model, not 3"):
        LayerStatistics().update(TOKENS[0][:3], TABLE)
    with pytest.raises(InputError, match="3 of the 49 tokens of a model do not tell its norms: pass its model_scale"):
        fit(seen(), "l2").normalize(TOKENS[0][:3], TABLE)
    with pytest.raises(InputError, match=r"0.weight has moments of 44 values, but the layer table says 45"):
        LayerStatistics().add({"0.weight": moments(torch.zeros(44))}, TABLE)
    with pytest.raises(InputError, match=r"0.weight has moments of 0 values"):
        scale_of({}, TABLE)
    with pytest.raises(InputError, match="only l2"):
        normalization.denormalize(TOKENS[0], TABLE, torch.ones(6))
    with pytest.raises(InputError, match="only l2"):
        fit(seen(), "l2").denormalize(TOKENS[0], TABLE, torch.ones(5))


@pytest.mark.parametrize("mode", ["standardize", "minmax", "l2"])
def test_weights_that_are_not_finite_are_refused_when_fitting(mode):
    for bad in (torch.nan, torch.inf):
        state_dict = {"a.weight": torch.randn(2, 3), "b.weight": torch.tensor([[1.0, bad]])}
        table = build_layer_table(state_dict)
        with np.errstate(invalid="ignore"), pytest.raises(InputError, match="layer 1 holds NaN or infinite"):
            fit(seen([tokenize(state_dict, table)], table), mode)


def test_without_normalisation_the_sign_of_zero_comes_back_and_the_tokens_stay():
    table = build_layer_table({"a.weight": torch.zeros(2, 3)}, token_size=4)
    tokens_NT = torch.tensor([[-0.0, 1.0, 0.0, 7.0], [0.0, -0.0, 2.0, 7.0]])  # 7 where there is padding
    kept = tokens_NT.clone()
    restored_NT = Normalization("none", np.zeros(1), np.ones(1)).denormalize(tokens_NT, table)
    assert torch.equal(restored_NT.signbit()[:, :3], tokens_NT.signbit()[:, :3]) and torch.equal(tokens_NT, kept)
    assert restored_NT[:, 3].tolist() == [0.0, 0.0]
