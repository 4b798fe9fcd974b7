import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_training import EXTRA, make_state, train, trained, whole

from sane_ray.errors import InputError
from sane_ray.pretraining.state import seed_of


def test_a_state_taken_over_trains_on_bit_by_bit():
    state = trained(3)
    tensors, record = whole(state), state.record()
    uninterrupted = whole(train(state, 3))
    resumed = make_state(seed=5)
    resumed.restore(record)
    resumed.load_state_dict(tensors)
    assert resumed.record() == record
    end = whole(train(resumed, 3))
    assert [name for name, tensor in uninterrupted.items() if not torch.equal(end[name], tensor)] == []


def test_looking_at_a_state_that_has_not_stepped_does_not_change_its_training():
    plain, looked_at = make_state(), make_state()
    assert all(int(t) == 0 for name, t in looked_at.state_dict().items() if name.endswith(".step"))
    ends = []
    for state in (plain, looked_at):
        torch.manual_seed(3)
        ends.append(whole(train(state, 2)))
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())


def test_the_record_is_json_and_a_copy():
    state = trained(2)
    record = state.record()
    state.extra["norms"].append(7.0)
    train(state)
    assert (record["step"], record["skipped"], record["extra"]["norms"]) == (2, [1, 4], EXTRA["norms"][:2])
    assert json.loads(json.dumps(record)) == record


def test_restoring_seeds_a_rank_that_no_checkpoint_knows_from_seed_step_and_rank():
    state = make_state(seed=4)
    record = trained(3).record()
    draws = []
    for _ in range(2):
        state.restore(record)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)
    torch.manual_seed(seed_of(4, 3, 0))
    assert torch.equal(torch.rand(3), draws[0])
    assert len({seed_of(4, 3, 0), seed_of(4, 3, 1), seed_of(4, 4, 0), seed_of(5, 3, 0)}) == 4


def test_hyperparameters_of_the_schedule_come_back_and_the_way_of_computing_does_not():
    state = trained(3)
    record = state.record()
    other = make_state()
    other.optimizer.param_groups[0]["fused"] = False
    other.restore(record)
    mine, theirs = (s.optimizer.param_groups[0] for s in (other, state))
    assert (mine["lr"], mine["betas"], mine["weight_decay"]) == (theirs["lr"], theirs["betas"], theirs["weight_decay"])
    assert (mine["fused"], theirs["fused"]) == (False, True)
    assert other.scheduler.get_last_lr() == state.scheduler.get_last_lr()


def test_an_optimiser_of_other_groups_is_refused():
    record = trained(1).record()
    record["param_groups"].pop()
    with pytest.raises(InputError, match="1 parameter groups, but this run's has 2"):
        make_state().restore(record)
