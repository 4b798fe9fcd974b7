import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ingest

from sane_ray.config import PRESETS


@pytest.fixture(scope="module")
def store(ray_session, tmp_path_factory):
    return ingest.make_store(PRESETS["digits"](), "digits", 30, tmp_path_factory.mktemp("ingest"))


def test_plain_reading_cuts_as_many_windows_as_the_plan(store):
    for augmentation in ingest.VIEWS.values():
        reader = ingest.make_reader(store, PRESETS["digits"](), augmentation)
        assert reader.plan.windows_per_epoch == 3 * store.counts("train").checkpoints  # 52 tokens in windows of 32
        assert ingest.read_plainly(reader, store) == reader.plan.windows_per_epoch


def test_all_three_are_measured(store, capsys):
    reader = ingest.make_reader(store, PRESETS["digits"](), ingest.VIEWS["permuted"])
    plain, ours = ingest.in_turns(reader, store, rounds=1)
    streamed, first = ingest.rate_of_stream(reader, store, seconds=0.1)
    for rate, views in ((plain, 1), (ours, 2), (streamed, 2)):
        assert rate.windows > 0
        assert rate.megabytes == pytest.approx(rate.windows * views * 32 * 73 * 2 / 1e6)
    ingest.print_rates("permuted", plain, ours, streamed, first)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["permuted", "plain", "reader", "stream"]
    assert float(lines[3].split()[3]) == pytest.approx(streamed.windows / plain.windows, abs=0.01)


def test_a_resnet_of_the_benchmark_has_a_symmetry():
    shapes = ingest.shapes_of("resnet18")
    assert shapes["layer2.0.downsample.1.weight"] == (128,) and shapes["bn1.running_var"] == (64,)
    assert list(shapes)[:2] == ["conv1.weight", "bn1.weight"]


def test_waiting_is_weighed_by_the_time_of_the_steps(capsys):
    slow = [{"step": 1}, {"step": 2, "data_wait_fraction": 0.5, "tokens_per_s": 10.0}]
    fast = [{"step": 3}, {"step": 4, "data_wait_fraction": 0.01, "tokens_per_s": 40.0}]
    assert ingest.waiting(slow) == pytest.approx(0.5)
    assert ingest.waiting(slow + fast) == pytest.approx((0.5 * 4 + 0.01) / 5)
    ingest.print_waiting(slow + fast)
    assert "after step 2: 1.00% (aim: under 2%): ok" in capsys.readouterr().out
    ingest.print_waiting(fast + slow)
    assert "50.00% (aim: under 2%): TOO LONG" in capsys.readouterr().out


def test_help_teaches_and_bad_arguments_are_refused(capsys):
    with pytest.raises(SystemExit, match="0"):
        ingest.parse(["--help"])
    assert "page cache is warm" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        ingest.parse(["--rounds", "0"])
