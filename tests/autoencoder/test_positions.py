import dataclasses
import math
from fractions import Fraction

import pytest
import torch

from sane_ray.autoencoder.model import SANE
from sane_ray.autoencoder.positions import SinusoidalPositions, sinusoids
from sane_ray.autoencoder.published import config_to_published, state_dict_to_published
from sane_ray.config import AutoencoderConfig
from sane_ray.errors import InputError

CONFIG = AutoencoderConfig(
    token_size=24, window=12, d_model=32, heads=4, layers=2, latent_dim=8, positions="sinusoidal"
)


def places(*rows):
    return torch.tensor([rows])


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_sinusoids_are_sines_and_cosines_of_geometric_periods(size):
    frequencies = (size + 1) // 2
    growth = (2**20 / 4) ** (1 / max(frequencies - 1, 1))
    positions = torch.tensor([[0, 1, 2, 3, 100, 1000]])
    periods = torch.tensor([4 * growth**i for i in range(frequencies)], dtype=torch.float64)
    angles = 2 * math.pi * positions[..., None].double() / periods
    expected = torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :size]
    torch.testing.assert_close(sinusoids(positions, size, 2.0**20), expected.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("position", [2**24 + 1, 2**31 - 1, 10**15 + 7])
def test_huge_positions_lose_no_precision(position):
    steps = [round(Fraction(2**32) / Fraction(4 * (2.0**22) ** (i / 31))) for i in range(32)]
    angles = [2 * math.pi * float(Fraction(position * step % 2**32, 2**32)) for step in steps]
    expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
    found = sinusoids(torch.tensor([[position]]), 64, 2.0**24)[0, 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert (found - sinusoids(torch.tensor([[position + 1]]), 64, 2.0**24)[0, 0]).abs().max() > 0.1


@pytest.mark.parametrize("width", [2, 6, 12, 36, 128])
def test_each_part_of_a_position_has_its_own_values(width):
    embedding = SinusoidalPositions(width)
    origin, *moved = embedding(places([0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3]))[0]
    changed = [(row != origin).nonzero().flatten().tolist() for row in moved]
    first, second = width // 2 - width // 4, width // 2
    assert origin.shape == (width,)
    for values, allowed in zip(changed, (range(first), range(first, second), range(second, width)), strict=True):
        assert set(values) <= set(allowed)
        assert len(values) > 0 or len(allowed) == 0


def test_every_place_of_a_network_has_an_embedding_of_its_own():
    columns = torch.cartesian_prod(torch.arange(40), torch.arange(20), torch.arange(30))
    rows = SinusoidalPositions(64)(columns[None])[0]
    assert len(torch.unique(torch.round(rows, decimals=4), dim=0)) == len(columns)


def test_sinusoids_start_as_large_as_learned_tables_and_are_scaled_by_what_is_learned():
    embedding, positions = SinusoidalPositions(256), torch.randint(1000, (4, 50, 3))
    assert embedding(positions).square().mean().sqrt().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(embedding(positions.int()), embedding(positions))
    plain = embedding(positions)
    torch.nn.init.constant_(embedding.scale, 3.0)
    torch.testing.assert_close(embedding(positions), 3 * plain)
    embedding(positions).sum().backward()
    assert (embedding.scale.grad != 0).all()


def test_a_model_with_sinusoidal_positions_needs_no_sizes_and_takes_any():
    model = SANE(CONFIG)
    assert model.config.max_positions == []
    assert sum(p.numel() for p in model.positions.parameters()) == CONFIG.d_model
    tokens, positions = torch.randn(1, 12, 24), torch.randint(2**31, (1, 12, 3))
    z = model.encode(tokens, positions)
    assert torch.equal(z, model.encode(tokens, positions.int()))
    assert torch.equal(model(tokens, positions)[0], z)
    assert model.decode(z, positions).isfinite().all()
    shuffled = model.encode(tokens, positions.flip(1))
    assert not torch.allclose(z, shuffled, atol=1e-4)


def test_sizes_that_a_store_needs_are_no_limit():
    model = SANE(dataclasses.replace(CONFIG, max_positions=[3, 2, 2]))
    assert model.encode(torch.randn(1, 2, 24), places([9, 9, 9], [2, 1, 1])).isfinite().all()


def test_wrong_positions_are_still_refused():
    model, tokens = SANE(CONFIG), torch.zeros(1, 2, 24)
    with pytest.raises(InputError, match=r"positions: -1 is negative: token index, layer and channel count from 0"):
        model.encode(tokens, places([0, 0, 0], [4, -1, 0]))
    with pytest.raises(InputError, match=r"torch.float32 \[1, 2, 3\]: they must be int32 or int64"):
        model.encode(tokens, places([0, 0, 0], [4, 1, 0]).float())
    with pytest.raises(InputError, match=r"they must be int32 or int64 \[1, 2, 3\]"):
        model.encode(tokens, places([0, 0], [4, 1]))


def test_sinusoidal_models_are_saved_built_on_no_device_and_cast(tmp_path):
    model = SANE(CONFIG, seed=3)
    torch.nn.init.normal_(model.positions.scale)
    model.save_pretrained(tmp_path / "model")
    loaded = SANE.from_pretrained(tmp_path / "model")
    assert loaded.config == CONFIG
    tokens, positions = torch.randn(2, 12, 24), torch.randint(1000, (2, 12, 3))
    assert torch.equal(loaded.encode(tokens, positions), model.encode(tokens, positions))
    with torch.device("meta"):
        empty = SANE(CONFIG)
        assert empty.positions(torch.empty(2, 12, 3, dtype=torch.int64)).shape == (2, 12, 32)
    empty.to_empty(device="cpu")
    empty.init_weights(seed=3)
    assert all(
        torch.equal(value, SANE(CONFIG, seed=3).state_dict()[name]) for name, value in empty.state_dict().items()
    )
    low = loaded.bfloat16().encode(tokens.bfloat16(), positions)
    assert low.dtype == torch.bfloat16


def test_the_published_code_has_no_sinusoidal_positions():
    config = dataclasses.replace(CONFIG, max_positions=[5, 5, 5], projection_dim=30)
    message = r"autoencoder.positions is 'sinusoidal': the published code only has learned ones"
    with pytest.raises(InputError, match=message):
        config_to_published(config)
    with pytest.raises(InputError, match=message):
        state_dict_to_published(SANE(config).state_dict(), config)
