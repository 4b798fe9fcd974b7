from sane_ray.pretraining.history import last_point, read_history
from sane_ray.pretraining.history_callback import HistoryCallback


def report(callback, *steps, loss=1.0):
    points = [{"step": step, "train/loss": loss} for step in steps]
    callback.after_report(None, [{"history": points}, {"history": [{"step": 99}]}], None)


def test_rank_0_is_kept_in_order_and_a_repeated_step_counts_once(tmp_path):
    callback = HistoryCallback(tmp_path / "history.jsonl")
    report(callback, 1, 2, 3)
    report(callback, 2, 3, 4, loss=0.5)  # a restart goes back to its last checkpoint
    callback.after_report(None, [{"step": 4}], None)
    history = read_history(tmp_path / "history.jsonl")
    assert [(point["step"], point["train/loss"]) for point in history] == [(1, 1.0), (2, 0.5), (3, 0.5), (4, 0.5)]


def test_a_line_left_unfinished_is_left_out(tmp_path):
    path = tmp_path / "history.jsonl"
    report(HistoryCallback(path), 1, 2)
    with path.open("a") as file:
        file.write('{"step": 3, "train/lo')
    assert [point["step"] for point in read_history(path)] == [1, 2]
    assert last_point(path) == {"step": 2, "train/loss": 1.0}


def test_a_new_line_begins_after_an_unfinished_one(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "tra')
    report(HistoryCallback(path), 2, 3)
    assert [point["step"] for point in read_history(path)] == [1, 2, 3]


def test_points_wait_while_the_folder_is_away(tmp_path, caplog):
    path = tmp_path / "run" / "history.jsonl"
    callback = HistoryCallback(path)
    for step in (1, 2, 3):
        report(callback, step)
    assert len(caplog.records) == 1
    assert "history.jsonl cannot be written" in caplog.text
    path.parent.mkdir()
    report(callback, 4)
    report(callback, 5)
    assert [point["step"] for point in read_history(path)] == [1, 2, 3, 4, 5]


def test_an_evaluation_that_comes_later_is_added_to_its_step(tmp_path):
    path = tmp_path / "history.jsonl"
    callback = HistoryCallback(path)
    report(callback, 1, 2)
    late = {"history": [{"step": 3, "train/loss": 0.5}], "evaluations": [{"step": 1, "eval/accuracy": 0.25}]}
    callback.after_report(None, [late], None)
    callback.after_report(None, [{"evaluations": [{"step": 2, "eval/accuracy": 0.5}]}], None)
    assert read_history(path)[0] == {"step": 1, "train/loss": 1.0, "eval/accuracy": 0.25}
    assert last_point(path) == {"step": 3, "train/loss": 0.5}


def test_the_last_point_of_a_long_history_and_of_none(tmp_path):
    path = tmp_path / "history.jsonl"
    assert last_point(path) is None
    assert read_history(path) == []
    report(HistoryCallback(path), *range(1, 5000))
    assert last_point(path) == {"step": 4999, "train/loss": 1.0}
