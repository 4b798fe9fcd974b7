import runpy
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parents[2] / "jobs" / "build_zoo.py"
SMALL = ("--zoo.models", "2", "--zoo.checkpoint_epochs", "[0, 1]")


@pytest.fixture
def run(ray_session, tmp_path, monkeypatch, capsys):
    """Runs the job's file with arguments, in an empty folder and on the session's Ray; gives what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, expect=0):
        monkeypatch.setattr(sys, "argv", [str(JOB), *arguments])
        status = 0
        try:
            runpy.run_path(str(JOB), run_name="__main__")
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        assert status == expect, printed.err
        return printed

    return run


def test_builds_where_told_and_says_what_is_next(run, tmp_path):
    output = run("--storage", str(tmp_path), *SMALL).out
    zoo = tmp_path / "zoos" / "digits"
    assert len(list(zoo.glob("NN_*/checkpoint_00000[01]/checkpoints"))) == 4
    assert output.splitlines()[-1].endswith(f"python jobs/prepare.py --source {zoo}")
    assert "nothing to do" not in output
    again = run("--storage", str(tmp_path), *SMALL).out
    assert again.startswith(f"nothing to do: 2 models in {zoo}; next: ") and len(again.splitlines()) == 1


def test_dry_run_prints_the_plan_and_writes_nothing(run, tmp_path):
    output = run("--dry-run", *SMALL).out
    assert "2 digits_cnn of 2,044 parameters; 2 to train" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--zoo.dataset", "absent.npz"), "no such file"),
        (("--zoo.architecture", "cnn_l"), "too small"),
        (("--zoo.activations", "[step]"), "'relu'"),
        (("--zoo.epochs", "3"), "zoo.epochs"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, arguments, words):
    result = run(*arguments, expect=2)
    assert words in result.err
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
