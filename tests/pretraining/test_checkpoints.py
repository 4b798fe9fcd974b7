import json
import logging
import pickle
import random
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_training import (
    EXTRA,
    checkpoints_in,
    fail_on_the_last_rank,
    in_ranks,
    limit_file_size,
    load,
    make_state,
    resume,
    save,
    save_for_ever,
    start,
    start_on_own_folders,
    train,
    trained,
    whole,
)

from sane_ray.errors import InputError
from sane_ray.pretraining.checkpoint_files import read_metadata
from sane_ray.pretraining.checkpoints import MANIFEST
from sane_ray.pretraining.state import RNG

SHARD, INDEX = "__0_0.distcp", ".metadata"


def names(run):
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def name(step):
    return f"step_{step:09d}"


def differences(expected, tensors):
    """Names of what is not bit-equal; generators belong to ranks."""
    return [n for n, t in expected.items() if not n.startswith(RNG) and not torch.equal(t, tensors[n])]


@pytest.fixture
def two_checkpoints(tmp_path):
    """A run folder with checkpoints of steps 1 and 2, and the tensors of each."""
    state, checkpoints = trained(1), checkpoints_in(tmp_path)
    checkpoints.save(state)
    first = whole(state)
    checkpoints.save(train(state))
    return tmp_path, {1: first, 2: whole(state)}


# what comes back


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (2, 2), (2, 1), (1, 2), (2, 3)])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, writers, readers):
    saved = in_ranks(writers, save, tmp_path, 3)
    loaded = in_ranks(readers, load, tmp_path)
    reference = trained(3).record()
    for rank, result in enumerate(loaded):
        assert result["step"] == 3
        assert result["record"] == reference | {"step": 3, "skipped": [1, 4], "extra": EXTRA}
        assert differences(saved[0], result["tensors"]) == []
        if rank < writers:
            key = f"{RNG}{rank}.cpu"
            assert torch.equal(result["tensors"][key], saved[rank][key])
    assert len({tuple(result["tensors"][f"{RNG}{rank}.cpu"].tolist()) for rank, result in enumerate(loaded)}) >= min(
        readers, 1 + max(0, readers - writers)
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_bit_equal_to_one_that_saved_and_went_on(tmp_path, ranks):
    for result in in_ranks(ranks, resume, tmp_path):
        assert result["step"] == 3
        assert differences(result["uninterrupted"], result["resumed"]) == []


def test_one_process_without_torch_distributed_reads_what_two_ranks_wrote(tmp_path):
    saved = in_ranks(2, save, tmp_path, 2)[0]
    assert differences(saved, load(tmp_path)["tensors"]) == []


def test_the_checkpoint_holds_the_state_of_begin_whatever_training_does_meanwhile(tmp_path):
    state, checkpoints = trained(2), checkpoints_in(tmp_path)
    for _ in range(3):  # the copy in main memory is used again
        before = whole(state)
        checkpoints.begin(state)
        state.skipped.append(state.step)
        train(state, 4)
        state.extra["norms"].append(1.0)
        checkpoints.finish()
        loaded = load(tmp_path)
        assert differences(before, loaded["tensors"]) == []
        assert set(differences(before, whole(state))) >= {"model.0.weight", "optimizer.0.weight.exp_avg"}
        assert loaded["record"]["step"] == state.step - 4
        assert state.step - 4 not in loaded["record"]["skipped"]


def test_nothing_there_is_no_checkpoint_and_changes_nothing(tmp_path):
    state = make_state()
    before = whole(state)
    assert checkpoints_in(tmp_path).load_latest(state) is None
    assert state.step == 0 and differences(before, whole(state)) == []


def test_the_manifest_says_what_is_in_the_folder(two_checkpoints):
    run, _ = two_checkpoints
    folder = run / "checkpoints" / name(2)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["step"], manifest["world_size"]) == (2, 1)
    assert manifest["state"]["extra"] == EXTRA
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != MANIFEST}
    assert {file: entry["bytes"] for file, entry in manifest["files"].items()} == sizes
    assert set(sizes) == {SHARD, INDEX}


# what is kept


def test_the_newest_are_kept_and_what_is_not_ours_is_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    for mine in (name(1), f"{name(2)}.damaged", f"{name(9)}"):  # interrupted, damaged, and being written by another
        (folder / mine).mkdir(parents=True)
    for foreign in ("step_1", "step_000000001.bak", "notes"):
        (folder / foreign).mkdir()
    (folder / name(3)).write_text("a file")
    state, checkpoints = make_state(), checkpoints_in(tmp_path, keep=3)
    for _ in range(7):
        checkpoints.begin(train(state))
    checkpoints.finish()
    kept = [name(5), name(6), name(7), name(9)]
    assert names(tmp_path) == sorted([*kept, "step_1", "step_000000001.bak", "notes", name(3)])
    assert (tmp_path / "checkpoints" / name(7) / MANIFEST).exists()


def test_fewer_than_two_are_never_kept(tmp_path):
    with pytest.raises(ValueError, match="keep is 1"):
        checkpoints_in(tmp_path, keep=1)


def test_a_second_checkpoint_of_a_step_counts_more_than_the_first(tmp_path):
    state, checkpoints = trained(2), checkpoints_in(tmp_path)
    checkpoints.save(state)
    state.skipped = [0]
    checkpoints.save(state)
    assert names(tmp_path) == [name(2), f"{name(2)}_2"]
    assert load(tmp_path)["record"]["skipped"] == [0]
    checkpoints.save(train(state))
    assert names(tmp_path) == [f"{name(2)}_2", name(3)]


# damage


def shorten(folder):
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-1])


def flip(file, place):
    def damage(folder):
        content = bytearray((folder / file).read_bytes())
        content[place % len(content)] ^= 1
        (folder / file).write_bytes(content)

    return damage


def lie(folder):
    """An index of another checkpoint, with the right sums."""
    _rewrite(folder, INDEX, pickle.dumps({"storage_data": 3}))


def _rewrite(folder, file, content):
    import zlib

    (folder / file).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["crc32"]
    manifest["files"][file] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    manifest["crc32"] = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGE = {
    "missing shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "missing index": (lambda folder: (folder / INDEX).unlink(), f"{INDEX} is missing"),
    "short shard": (shorten, f"{SHARD} has [0-9]+ bytes instead of [0-9]+"),
    "flipped bit of the shard": (flip(SHARD, 5000), f"{SHARD}: its checksum is wrong"),
    "flipped bit of the index": (flip(INDEX, 50), f"{INDEX}: its checksum is wrong"),
    "manifest of nothing": (lambda folder: (folder / MANIFEST).write_text(""), f"{MANIFEST}: Expecting value"),
    "manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("[]"), f"{MANIFEST}: not of a"),
    "index of something else": (lie, f"{INDEX}: .*holds a dict"),
    "shard that is no archive": (
        lambda folder: _rewrite(folder, SHARD, bytes((folder / SHARD).stat().st_size)),
        "Error",
    ),
    "shard that is a folder": (lambda folder: _folder_instead(folder / SHARD), f"{SHARD} "),
}


def _folder_instead(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("kind", DAMAGE)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(two_checkpoints, caplog, kind):
    run, saved = two_checkpoints
    damage, said = DAMAGE[kind]
    folder = run / "checkpoints" / name(2)
    damage(folder)
    loaded = load(run)
    assert loaded["step"] == 1
    assert differences(saved[1], loaded["tensors"]) == []
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert re.search(f"{re.escape(str(folder))} is damaged \\(.*{said}.*{name(1)} is taken instead", warning)
    assert names(run) == [name(1), f"{name(2)}.damaged"]


def test_a_changed_number_in_the_manifest_is_damage(two_checkpoints):
    run, _ = two_checkpoints
    path = run / "checkpoints" / name(2) / MANIFEST
    path.write_text(path.read_text().replace('"skipped": [\n   1', '"skipped": [\n   2'))
    assert load(run)["step"] == 1


def test_two_ranks_agree_on_the_damage_that_one_of_them_finds(tmp_path):
    in_ranks(2, save, tmp_path, 1)
    in_ranks(2, save, tmp_path, 2)
    flip("__1_0.distcp", 3000)(tmp_path / "checkpoints" / name(2))
    assert [result["step"] for result in in_ranks(2, load, tmp_path)] == [1, 1]


def test_when_all_are_damaged_training_starts_anew_from_an_untouched_state(two_checkpoints, caplog):
    run, _ = two_checkpoints
    _rewrite(run / "checkpoints" / name(2), SHARD, bytes(100_000))
    shorten(run / "checkpoints" / name(1))
    state = make_state(seed=3)
    before = whole(state)
    assert checkpoints_in(run).load_latest(state) is None
    assert (state.step, differences(before, whole(state))) == (0, [])
    assert "training starts anew" in caplog.text
    checkpoints = checkpoints_in(run)
    checkpoints.save(train(state))
    assert load(run)["step"] == 1


def test_a_folder_without_manifest_is_no_checkpoint_and_no_damage(two_checkpoints, caplog):
    run, _ = two_checkpoints
    shutil.copytree(run / "checkpoints" / name(2), run / "checkpoints" / name(3))
    (run / "checkpoints" / name(3) / MANIFEST).unlink()
    assert load(run)["step"] == 2
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert name(3) in names(run)


def test_damaged_ones_go_when_sound_ones_have_outlived_them(two_checkpoints):
    run, _ = two_checkpoints
    shorten(run / "checkpoints" / name(2))
    state, checkpoints = make_state(), checkpoints_in(run)
    checkpoints.load_latest(state)
    train(state)
    checkpoints.save(train(state))
    assert names(run) == [name(1), f"{name(2)}.damaged", name(3)]
    checkpoints.save(train(state))
    assert names(run) == [name(3), name(4)]


def test_a_pickle_that_asks_for_more_than_metadata_is_not_run(two_checkpoints):
    run, _ = two_checkpoints
    folder = run / "checkpoints" / name(2)

    class Harm:
        def __reduce__(self):
            return (Path.touch, (run / "harmed",))

    (folder / INDEX).write_bytes(pickle.dumps(Harm()))
    with pytest.raises(pickle.UnpicklingError, match="asks for"):
        read_metadata(folder)
    assert not (run / "harmed").exists()


# refusals


def test_another_format_version_is_refused(two_checkpoints):
    run, _ = two_checkpoints
    path = run / "checkpoints" / name(2) / MANIFEST
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(InputError, match=r"complete.json has format_version 2, this sane_ray reads 1"):
        load(run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: make_state(width=8), r"model.0.bias has torch.Size\(\[7\]\) there and torch.Size\(\[8\]\) here"),
        (lambda: _without_bias(make_state()), "model.3.bias is not in this model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(two_checkpoints, change, said):
    run, _ = two_checkpoints
    state = change()
    before = whole(state)
    with pytest.raises(InputError, match=said):
        checkpoints_in(run).load_latest(state)
    assert (state.step, differences(before, whole(state))) == (0, [])
    assert names(run) == [name(1), name(2)]


def _without_bias(state):
    state.model[3].bias = None
    state.optimizer.param_groups[1]["params"].pop()
    return state


def test_a_folder_that_ranks_do_not_share_is_refused(tmp_path):
    for said in in_ranks(2, start_on_own_folders, tmp_path):
        assert re.search("checkpoints is another folder on worker 1 than on worker 0: .* all nodes share", said)


# storage away


def take_away(run):
    (run / "checkpoints").rename(run / "away")
    (run / "checkpoints").write_text("no folder")


def bring_back(run):
    (run / "checkpoints").unlink()
    (run / "away").rename(run / "checkpoints")


def test_a_checkpoint_that_storage_refuses_is_dropped_and_the_next_is_written(tmp_path, caplog):
    state, checkpoints = make_state(), checkpoints_in(tmp_path)
    checkpoints.save(train(state))
    take_away(tmp_path)
    checkpoints.begin(train(state))
    checkpoints.begin(train(state))
    checkpoints.finish()
    assert caplog.text.count("training goes on without it") == 2
    bring_back(tmp_path)
    assert names(tmp_path) == [name(1)]
    checkpoints.begin(train(state))
    checkpoints.finish()
    assert names(tmp_path) == [name(1), name(4)]
    assert load(tmp_path)["step"] == 4


def test_save_and_load_wait_for_storage_and_then_say_where_it_is_missing(tmp_path):
    state, checkpoints = make_state(), checkpoints_in(tmp_path, patience_s=0.2)
    checkpoints.save(train(state))
    take_away(tmp_path)
    folder = re.escape(str(tmp_path / "checkpoints"))
    with pytest.raises(InputError, match=f"{folder} could not be written for 0.2 s .* mend the storage"):
        checkpoints.save(train(state))
    with pytest.raises(InputError, match=f"{folder} could not be read for 0.2 s .* mend the storage"):
        checkpoints.load_latest(state)
    bring_back(tmp_path)
    checkpoints.save(state)
    assert load(tmp_path)["step"] == 2


def test_save_and_load_go_on_when_storage_comes_back(tmp_path):
    from threading import Timer

    state, checkpoints = make_state(), checkpoints_in(tmp_path, patience_s=60)
    checkpoints.save(train(state))
    for work in (lambda: checkpoints.save(train(state)), lambda: checkpoints.load_latest(make_state())):
        take_away(tmp_path)
        back = Timer(0.5, bring_back, [tmp_path])
        back.start()
        work()
        back.join()
    assert names(tmp_path) == [name(1), name(2)]
    assert load(tmp_path)["step"] == 2


def test_a_run_folder_that_is_missing_is_storage_away_not_a_new_run(two_checkpoints):
    run, _ = two_checkpoints
    moved = run.rename(run.with_name("unmounted"))
    checkpoints = checkpoints_in(run, patience_s=0.2)
    with pytest.raises(InputError, match="could not be read"):
        checkpoints.load_latest(make_state())
    assert not run.exists()
    moved.rename(run)
    assert checkpoints.load_latest(make_state()) == 2


def test_a_disk_that_is_full_in_the_middle_of_a_file_costs_that_checkpoint_alone(two_checkpoints, caplog):
    run, saved = two_checkpoints
    state, checkpoints = make_state(), checkpoints_in(run)
    checkpoints.load_latest(state)
    limit_file_size(9000)
    try:
        checkpoints.begin(train(state))
        checkpoints.finish()
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    assert "File too large" in caplog.text
    assert differences(saved[2], load(run)["tensors"]) == []
    checkpoints.begin(train(state))
    checkpoints.finish()
    assert names(run) == [name(2), name(4)]


def test_if_one_rank_cannot_write_no_rank_counts_the_checkpoint(tmp_path):
    for result in in_ranks(2, fail_on_the_last_rank, tmp_path):
        assert result["steps"] == [2, 2, 5]
        assert re.search(r"could not be written for 0.5 s \(.*worker 1: .*File too large", result["error"])
    assert [result["step"] for result in in_ranks(2, load, tmp_path)] == [5, 5]


# interruption


def newest(run):
    """Step of the newest checkpoint folder, complete or not."""
    return max((int(entry[5:14]) for entry in names(run)), default=0) if (run / "checkpoints").exists() else 0


def test_a_run_killed_at_any_moment_leaves_its_last_complete_checkpoint(tmp_path, caplog):
    chance = random.Random(0)
    step = 0
    for _ in range(6):
        process = start(save_for_ever, tmp_path)
        deadline = time.monotonic() + 100
        while newest(tmp_path) < step + 4 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        before = newest(tmp_path)
        loaded = load(tmp_path)
        assert max(step, before - 1) <= loaded["step"] <= before
        assert loaded["step"] > step
        step = loaded["step"]
    assert "damaged" not in caplog.text
    assert differences(loaded["tensors"], whole(train_seeded(step))) == []


def train_seeded(steps):
    """What ``save_for_ever`` has after so many steps; killed and resumed, dropout went on where it was."""
    return train(make_state(), steps)
