import torch

from sane_ray.pretraining.batch import Batch


def batch(view_1, view_2):
    signal = torch.ones(4, 3, dtype=torch.int32)
    positions = torch.zeros(4, 3, 3, dtype=torch.int32)
    return Batch(view_1, view_2, signal, positions, torch.arange(4), torch.arange(4) * 10)


def test_rows_are_the_same_rows_of_everything():
    view_1, view_2 = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    part = batch(view_1, view_2).rows(1, 3)
    assert len(part) == 2
    assert torch.equal(part.view_2, view_2[1:3])
    assert (part.slot.tolist(), part.checkpoint.tolist()) == ([1, 2], [10, 20])


def test_two_views_that_are_one_stay_one():
    view = torch.randn(4, 3, 2)
    alike = batch(view, view).rows(0, 2)
    assert alike.view_2 is alike.view_1
    assert batch(view, view.clone()).rows(0, 2).view_2 is not alike.view_1
