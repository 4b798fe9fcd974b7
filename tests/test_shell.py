"""Commands that can be typed as they are printed."""

import sys

import pytest

from sane_ray.shell import command


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes folders of programs, and says where this environment's Python is and what PATH holds."""

    def make(*folders: str, ours: str, path: str) -> None:
        for folder in folders:
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "mlflow").touch(mode=0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / ours / "python"))
        monkeypatch.setenv("PATH", str(tmp_path / path))
        monkeypatch.chdir(tmp_path)

    return make


def test_an_activated_environment_is_called_by_name(programs):
    programs("bin", ours="bin", path="bin")
    assert command("mlflow") == "mlflow"


def test_another_one_first_in_path_is_not_called(programs):
    programs("bin", "other", ours="bin", path="other")
    assert command("mlflow") == "bin/mlflow"


def test_not_activated_it_is_called_by_its_path(programs, tmp_path, monkeypatch):
    programs("my bin", ours="my bin", path="nowhere")
    assert command("mlflow") == "'my bin/mlflow'"
    monkeypatch.chdir("/usr")
    assert command("mlflow") == f"'{tmp_path}/my bin/mlflow'"


def test_a_program_that_is_not_installed_here_is_called_by_name(programs):
    programs("bin", ours="bin", path="bin")
    assert command("python") == "python"
