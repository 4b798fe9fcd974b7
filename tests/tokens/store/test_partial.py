import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sane_ray.errors import InputError
from sane_ray.tokens.store.partial import partial_folder

HOLDER = """
import sys, time
from pathlib import Path
from sane_ray.tokens.store.partial import partial_folder
with partial_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process in the middle of writing ``store``."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "store")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_folder_appears_whole(tmp_path: Path):
    with partial_folder(tmp_path / "deep" / "store") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "deep" / "store").exists()
    assert everything(tmp_path) == ["deep", "deep/store", "deep/store/file"]


def test_an_empty_destination_is_filled(tmp_path: Path):
    (tmp_path / "store").mkdir()
    with partial_folder(tmp_path / "store") as folder:
        (folder / "file").touch()
    assert everything(tmp_path) == ["store", "store/file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error), partial_folder(tmp_path / "store") as folder:
        (folder / "tokens").mkdir()
        (folder / "tokens" / "part").write_text("half")
        raise error
    assert everything(tmp_path) == []


def test_a_block_that_writes_nothing_leaves_nothing(tmp_path: Path):
    with partial_folder(tmp_path / "store"):
        pass
    assert everything(tmp_path) == []


def test_a_living_writer_is_not_disturbed(tmp_path: Path, holder: subprocess.Popen):
    with (
        pytest.raises(InputError, match=rf"store: another run is writing it \(process {holder.pid} on .*name another"),
        partial_folder(tmp_path / "store"),
    ):
        pass
    assert (tmp_path / ".store.partial" / "half").read_text() == "written"


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path, holder: subprocess.Popen):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".store.partial" / "half").exists()
    with partial_folder(tmp_path / "store") as folder:
        (folder / "whole").touch()
    assert everything(tmp_path) == ["store", "store/whole"]


def test_ctrl_c_leaves_nothing(tmp_path: Path, holder: subprocess.Popen):
    os.kill(holder.pid, signal.SIGINT)
    holder.wait()
    assert everything(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/store cannot be written"), partial_folder(tmp_path / "file" / "store"):
        pass
