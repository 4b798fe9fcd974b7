import pytest
import torch

from sane_ray.config import AugmentationConfig
from sane_ray.pretraining.augment import augmented_views, bits, normal, rectangles, row_keys, uniform

ROWS, W, T = 6, 9, 7
SLOTS = torch.arange(ROWS)


def views(seed=0):
    generator = torch.Generator().manual_seed(seed)
    padding = torch.arange(T) >= torch.randint(1, T + 1, (2 * ROWS, W, 1), generator=generator)
    return torch.randn(2 * ROWS, W, T, generator=generator).masked_fill(padding, 0.0), padding


def noisy(tokens, slots=SLOTS, seed=0, step=3, **augmentation):
    return augmented_views(tokens, slots, AugmentationConfig(**augmentation), seed=seed, step=step)


def test_bits_are_those_of_splitmix64():
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # of the published C code, seed 1234567
    assert [number % 2**64 for number in bits(torch.tensor([1234567]), 3)[0].tolist()] == expected


@pytest.mark.parametrize("erase", [0.0, 0.7])
def test_any_share_of_the_rows_is_augmented_as_the_whole_batch(erase):
    tokens, _ = views()
    whole = noisy(tokens, erase=erase).unflatten(0, (2, ROWS))
    order = torch.tensor([4, 1, 2])
    part = noisy(tokens.unflatten(0, (2, ROWS))[:, order].flatten(0, 1), SLOTS[order], erase=erase)
    torch.testing.assert_close(part.unflatten(0, (2, 3)), whole[:, order])
    torch.testing.assert_close(noisy(tokens[:ROWS], erase=erase), whole[0])


def test_padding_stays_zero():
    tokens, padding = views()
    assert (noisy(tokens, noise=0.5, erase=0.5)[padding] == 0).all()


@pytest.mark.parametrize(
    "changed", [{"slots": SLOTS + 1}, {"step": 4}, {"seed": 1}, {"augmentation_seed": 1}], ids=lambda c: next(iter(c))
)
def test_noise_differs_with_everything_that_it_depends_on(changed):
    tokens = torch.ones(2 * ROWS, W, T)
    settings = {"seed": 0} | changed
    first = noisy(tokens)
    other = augmented_views(
        tokens,
        settings.get("slots", SLOTS),
        AugmentationConfig(seed=settings.get("augmentation_seed", 0)),
        seed=settings["seed"],
        step=settings.get("step", 3),
    )
    assert (first != other).float().mean() > 0.99
    assert (first[:ROWS] != first[ROWS:]).float().mean() > 0.99
    assert torch.equal(first, noisy(tokens))


def test_noise_is_normal_and_independent():
    numbers = normal(row_keys(torch.arange(500), 2, (0, 0, 0)), torch.Size((20, 21)))
    moments = [float((numbers**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)
    assert torch.isfinite(numbers).all()
    correlation = torch.corrcoef(numbers.flatten(1).T)
    assert (correlation - torch.eye(420)).abs().max() < 0.2
    assert torch.corrcoef(numbers.flatten(1)).fill_diagonal_(0).abs().max() < 0.35


def test_uniform_numbers_fill_their_range_evenly():
    numbers = uniform(row_keys(torch.arange(200), 1, (0,)), 501)
    assert numbers.shape == (200, 501)
    counts = torch.histc(numbers, bins=10, min=-1, max=1)
    assert (counts / counts.mean() - 1).abs().max() < 0.05


def test_what_is_erased_is_a_rectangle_of_the_published_sizes_as_often_as_asked():
    erased = rectangles(row_keys(torch.arange(2000), 1, (0,)), torch.Size((32, 40)), 0.3)
    area = erased.float().mean((1, 2))
    assert float((area > 0).float().mean()) == pytest.approx(0.3, abs=0.04)
    some = erased[area > 0]
    rows, columns = some.any(2), some.any(1)
    assert torch.equal(some, rows[:, :, None] & columns[:, None, :])
    for covered in (rows, columns):  # without gaps
        assert (covered.int().diff(dim=1).abs().sum(1) <= 2).all()
    assert area[area > 0].min() > 0.015 and area.max() < 0.36
    ratio = rows.sum(1) / columns.sum(1)
    assert ratio.min() > 0.2 and ratio.max() < 4.5


def test_without_noise_and_erasing_views_are_only_converted():
    tokens, _ = views()
    assert torch.equal(noisy(tokens.half(), noise=0.0), tokens.half().float())
