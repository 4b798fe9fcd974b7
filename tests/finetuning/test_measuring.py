import numpy as np
import pytest
import torch

from sane_ray.config import FanOutConfig
from sane_ray.errors import InputError
from sane_ray.finetuning import measuring as module
from sane_ray.finetuning.evaluation import Evaluation, Histories, Piece
from sane_ray.finetuning.measuring import Failed, Measuring, succeeded
from sane_ray.finetuning.records import Records
from sane_ray.zoo.architectures import from_params


def piece(recipe, *seeds):
    states = [from_params({**recipe, "seed": seed}).state_dict() for seed in seeds]
    weights = {key: torch.stack([state[key] for state in states]).numpy() for key in states[0]}
    return Piece([{**recipe, "seed": 0}] * len(seeds), weights)


def misfit(recipe):
    one = piece(recipe, 9)
    return Piece(one.params, {key: value[:, :1] for key, value in (one.weights or {}).items()})


@pytest.fixture
def pieces(recipe):
    return [piece(recipe, 1, 2), piece(recipe, 3), piece(recipe, 4, 5)]


@pytest.fixture
def evaluated(monkeypatch):
    """Pieces that were really done in this process, by the number of their networks."""
    done = []
    plain = Evaluation.__call__

    def watched(self, piece):
        done.append(len(piece.params))
        return plain(self, piece)

    monkeypatch.setattr(Evaluation, "__call__", watched)
    return done


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.metrics_REM, other.metrics_REM)
        np.testing.assert_array_equal(one.logits_RTIC, other.logits_RTIC)


def test_what_is_recorded_is_not_done_again(digits, pieces, evaluated, tmp_path):
    with Measuring(digits, 0, [0], tmp_path, FanOutConfig()) as measuring:
        first = measuring([*pieces, pieces[1]])
        assert evaluated == [2, 1, 2]
        assert measuring.known(pieces) == 3
        assert_equal(measuring(pieces[::-1]), first[2::-1])
    with Measuring(digits, 0, [0], tmp_path, FanOutConfig()) as again:
        assert_equal(again(pieces), first[:3])
    assert evaluated == [2, 1, 2]
    with Measuring(digits, 0, [], tmp_path, FanOutConfig()) as other:  # other epochs
        assert other.known(pieces) == 0


def test_a_run_that_ends_halfway_goes_on(digits, pieces, evaluated, monkeypatch, tmp_path):
    with Measuring(digits, 1, [0, 1], tmp_path / "whole", FanOutConfig()) as measuring:
        whole = measuring(pieces)
    evaluated.clear()
    keep = Records.keep

    def kept_and_cut(self, key, histories):
        keep(self, key, histories)
        if self.folder.name == "cut" and len(evaluated) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Records, "keep", kept_and_cut)
    halfway = Measuring(digits, 1, [0, 1], tmp_path / "cut", FanOutConfig())
    with pytest.raises(KeyboardInterrupt), halfway:
        halfway(pieces)
    assert halfway.known(pieces) == 2
    with Measuring(digits, 1, [0, 1], tmp_path / "cut", FanOutConfig()) as measuring:
        assert_equal(measuring(pieces), whole)
    assert evaluated == [2, 1, 2]


def test_a_failing_piece_is_told_and_the_others_are_kept(digits, recipe, pieces, tmp_path):
    with Measuring(digits, 0, [0], tmp_path, FanOutConfig()) as measuring:
        results = measuring([pieces[0], misfit(recipe), pieces[1]])
    assert [type(result) for result in results] == [Histories, Failed, Histories]
    assert "do not fit" in results[1].reason
    assert len(list(tmp_path.iterdir())) == 2  # a failure is not recorded: it is tried again
    with pytest.raises(InputError, match="networks could not be measured: weights 0 do not fit"):
        succeeded(results)


def test_actors_give_the_same_to_the_bit(ray_session, digits, recipe, pieces, tmp_path):
    here, there = FanOutConfig(), FanOutConfig(actors=2)
    with Measuring(digits, 1, [0, 1], tmp_path / "here", here) as measuring:
        first = measuring([*pieces, misfit(recipe)])
    with Measuring(digits, 1, [0, 1], tmp_path / "there", there) as measuring:
        second = measuring([*pieces, misfit(recipe)])
        assert measuring.known(pieces) == 3
    assert_equal(first[:3], second[:3])
    assert isinstance(first[3], Failed) and isinstance(second[3], Failed)
    assert second[3].reason.startswith(first[3].reason)  # with the line of the code
    assert ray_session.is_initialized()


def test_only_little_work_is_done_here(digits, recipe):
    def is_small(epochs, networks, **changes):
        measuring = Measuring(digits, epochs, [], None, FanOutConfig(**changes))
        return measuring._is_small([piece(recipe, *range(4))] * (networks // 4))

    assert is_small(0, 100) and is_small(1, 100)
    assert not is_small(25, 40) and not is_small(0, 2000)
    assert not is_small(0, 4, actors=2) and not is_small(0, 4, gpus=0.5)
    assert is_small(0, 4, actors=1)


def test_progress_shows_where_it_takes_long(digits, pieces, monkeypatch, tmp_path, capsys):
    with Measuring(digits, 0, [0], tmp_path / "quick", FanOutConfig(), "measure") as measuring:
        measuring(pieces[:1])
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.0)
    with Measuring(digits, 0, [0], tmp_path / "slow", FanOutConfig(), "fine-tune") as measuring:
        measuring(pieces)
    shown = capsys.readouterr().err
    assert "measure" not in shown
    assert "fine-tune: 100%" in shown and "3/3" in shown
