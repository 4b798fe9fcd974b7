import math

import pytest
import torch

from sane_ray.autoencoder.embeddings import effective_rank, embedding_norm, embedding_statistics


def spread(*deviations, windows=4, tokens=8):
    """Embeddings whose covariance has exactly the squares of ``deviations`` as eigenvalues, around a far mean."""
    generator = torch.Generator().manual_seed(0)
    size, count = len(deviations), windows * tokens
    raw = torch.randn(count, size, generator=generator, dtype=torch.float64)
    white, _ = torch.linalg.qr(raw - raw.mean(dim=0))
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    z = math.sqrt(count) * white * torch.tensor(deviations) @ turn + 5
    return z.view(windows, tokens, size), torch.ones(windows, tokens, dtype=torch.int32)


@pytest.mark.parametrize(
    ("deviations", "rank"), [((1, 1, 1, 1), 4.0), ((2, 0, 0, 0), 1.0), ((1, 1, 0), 2.0), ((3, 1), 1.3841)]
)
def test_the_effective_rank_is_the_exponential_of_the_entropy_of_the_eigenvalues(deviations, rank):
    shares = [d * d / sum(e * e for e in deviations) for d in deviations if d]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    found = effective_rank(embedding_statistics(*spread(*map(float, deviations)))).item()
    assert found == pytest.approx(expected, rel=1e-6)
    assert found == pytest.approx(rank, rel=1e-4)


def test_statistics_of_batches_add_up_to_those_of_all():
    z, signal = spread(3.0, 2.0, 0.1)
    parts = [embedding_statistics(z[rows].float(), signal[rows]) for rows in ([0], [1, 2], [3])]
    torch.testing.assert_close(sum(parts), embedding_statistics(z.float(), signal), rtol=1e-12, atol=0)
    assert embedding_norm(sum(parts)).item() == pytest.approx(z.norm(dim=-1).mean().item(), rel=1e-6)


def test_only_tokens_of_windows_that_hold_weights_count():
    z, signal = spread(3.0, 2.0, 0.1)
    expected = embedding_statistics(z[[0, 2], :5], signal[[0, 2], :5])
    z[1], z[3] = math.nan, math.inf
    signal[:, 5:] = 0
    for rows, valid in ((signal, [True, False]), (signal.clone(), [True, False, True, False])):
        found = embedding_statistics(z, rows, torch.tensor(valid))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert expected[0] == 10


def test_embeddings_that_collapsed_have_rank_zero():
    signal = torch.ones(2, 3)
    for z in (torch.full((2, 3, 4), 0.1), torch.zeros(2, 3, 4)):
        assert effective_rank(embedding_statistics(z, signal)) == 0


def test_nothing_is_known_of_no_embeddings_and_of_broken_ones():
    z = torch.randn(2, 3, 4)
    assert effective_rank(embedding_statistics(z, torch.zeros(2, 3))).isnan()
    assert embedding_norm(embedding_statistics(z, torch.zeros(2, 3))).isnan()
    z[0, 0, 0] = math.nan
    assert effective_rank(embedding_statistics(z, torch.ones(2, 3))).isnan()
