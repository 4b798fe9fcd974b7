import numpy as np
import pytest

from sane_ray.properties.spectral import fit_power_law, spectral_metrics


def slow_fit(values: np.ndarray) -> tuple[float, float]:
    """Clauset, Shalizi & Newman (2009) as their text says, one row at a time."""
    best = (np.inf, np.nan, np.nan)
    for xmin in values[: len(values) - 4]:
        tail = values[values >= xmin]
        alpha = 1 + len(tail) / np.log(tail / xmin).sum()
        fitted = 1 - (tail / xmin) ** (1 - alpha)
        steps = np.arange(len(tail) + 1) / len(tail)
        distance = max(np.abs(steps[1:] - fitted).max(), np.abs(steps[:-1] - fitted).max())
        best = min(best, (distance, alpha, xmin))
    return best[1], best[2]


def test_alpha_of_a_power_law_is_found():
    generator = np.random.default_rng(0)
    for alpha in (2.0, 3.5):
        values = np.sort((1 - generator.random((4, 2000))) ** (-1 / (alpha - 1)), axis=1)
        assert fit_power_law(values)[0] == pytest.approx(alpha, rel=0.12)


def test_where_the_power_law_begins_is_found():
    generator = np.random.default_rng(1)
    body, tail = generator.random((1, 1500)), (1 - generator.random((1, 1500))) ** -1.0 + 0.0
    alpha, xmin, _ = fit_power_law(np.sort(np.concatenate([body, tail], axis=1), axis=1))
    assert alpha[0] == pytest.approx(2.0, rel=0.1) and 0.8 < xmin[0] < 3.0


def test_the_fit_is_the_textbook_one():
    values = np.sort(np.random.default_rng(2).lognormal(size=(5, 60)), axis=1)
    alpha, xmin, _ = fit_power_law(values)
    for row in range(5):
        assert (alpha[row], xmin[row]) == pytest.approx(slow_fit(values[row]), rel=1e-9)


def test_metrics_are_those_of_the_singular_values():
    matrices = np.random.default_rng(3).normal(size=(3, 12, 30))
    found = spectral_metrics(matrices)
    for matrix, row in zip(matrices, found, strict=True):
        eigenvalues = np.linalg.eigvalsh(matrix @ matrix.T)
        assert row[0] == pytest.approx(np.log10(np.linalg.norm(matrix) ** 2))
        assert row[1] == pytest.approx(np.log10(eigenvalues[-1]))
        assert row[2] == pytest.approx(eigenvalues.sum() / eigenvalues[-1])
        assert row[3] == pytest.approx(slow_fit(eigenvalues)[0])
        assert row[4] == pytest.approx(row[3] * row[1])
        assert row[5] == pytest.approx(np.log10((eigenvalues ** row[3]).sum()))


def test_large_eigenvalues_do_not_overflow():
    matrices = np.random.default_rng(3).normal(size=(1, 12, 30))
    small, large = spectral_metrics(matrices)[0], spectral_metrics(1e70 * matrices)[0]
    assert large[3] == pytest.approx(small[3], rel=1e-6) and small[3] > 2.5  # 1e140 ** 2.5 is no number
    assert large[5] == pytest.approx(small[5] + 140 * small[3], rel=1e-6)


def test_what_is_not_defined_is_nan():
    small = spectral_metrics(np.random.default_rng(4).normal(size=(1, 4, 9)))[0]
    assert np.isfinite(small[:3]).all() and np.isnan(small[3:]).all()
    assert np.isnan(spectral_metrics(np.zeros((1, 20, 20)))).all()
    rank_one = spectral_metrics(np.ones((1, 20, 20)))[0]
    assert rank_one[2] == pytest.approx(1.0) and np.isnan(rank_one[3])
    assert np.isnan(spectral_metrics(np.eye(20)[None])[0, 3])
