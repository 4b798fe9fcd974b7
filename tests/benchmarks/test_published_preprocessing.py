import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import published_preprocessing as benchmark

from sane_ray.zoo.catalog import discover, open_record

STAND_IN = '''
from pathlib import Path
import torch
import ray

def prepare_multiple_datasets(configurations):
    """Writes a sample for each checkpoint, all in the first split, and the normalisation."""
    import rebasin, torchvision.transforms, torchvision.models.resnet as resnet
    assert rebasin.PermutationCoordinateDescent and torchvision.transforms.RandomErasing and resnet.Bottleneck
    assert callable(ray.init) and configurations[0]["permutation_spec"] == "spec"
    target = Path(configurations[0]["dataset_target_path"])
    for number, config in enumerate(configurations):
        folder = target / f"dataset_torch.{config['splits'][0]}"
        folder.mkdir(parents=True)
        paths = sorted(Path(config["zoo_path"][0]).rglob("checkpoints")) if number == 0 else []
        for index, path in enumerate(paths[: LEAVE]):
            torch.save({"w": torch.zeros(201, 48, 201)}, folder / f"sample_{index}.pt")
'''


def stand_in(folder, leave="None"):
    """The shape of the published code: what this benchmark calls of it."""
    for package in ("SANE", "SANE/datasets", "SANE/git_re_basin"):
        (folder / "src" / package).mkdir(parents=True)
        (folder / "src" / package / "__init__.py").write_text("")
    (folder / "src/SANE/git_re_basin/git_re_basin.py").write_text("zoo_cnn_permutation_spec = 'spec'\n")
    (folder / "src/SANE/datasets/dataset_preprocessing.py").write_text(STAND_IN.replace("LEAVE", leave))
    return folder


def test_the_zoo_is_in_the_published_layout(tmp_path):
    benchmark.make_zoo(tmp_path, models=3)
    records = discover(tmp_path)
    assert len(records) == 3 * len(benchmark.EPOCHS)
    assert {record.epoch for record in records} == set(benchmark.EPOCHS)
    assert {len(record.properties) > 0 for record in records} == {True}
    weights = open_record(records[0]).state_dict()
    assert sum(value.numel() for value in weights.values()) == 2_464
    lines = (tmp_path / "NN_tune_trainable_00000" / "result.json").read_text().splitlines()
    assert [json.loads(line)["training_iteration"] for line in lines] == list(range(max(benchmark.EPOCHS) + 1))
    one, other = (open_record(record).state_dict()["module_list.0.weight"] for record in records[:2])
    assert 0 < float((one - other).abs().max()) < 0.02


def is_connected() -> bool:
    """Whether this process uses a Ray, its own or that of the other tests."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def test_the_published_side_runs_in_a_process_of_its_own(tmp_path):
    before = is_connected()
    benchmark.make_zoo(tmp_path / "zoo", models=2)
    code = stand_in(tmp_path / "code")
    result = benchmark.run_published(code, tmp_path, 2 * len(benchmark.EPOCHS))
    assert result.checkpoints == 6
    assert result.bytes > 6 * 201 * 48 * 201 * 4
    assert result.seconds > 0
    assert is_connected() == before


def test_samples_that_are_missing_end_the_comparison(tmp_path):
    benchmark.make_zoo(tmp_path / "zoo", models=2)
    code = stand_in(tmp_path / "code", leave="4")
    with pytest.raises(SystemExit, match="wrote 4 samples of 6 checkpoints"):
        benchmark.run_published(code, tmp_path, 6)


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(SystemExit, match=r"ended with 3:[\s\S]*the reason"):
        benchmark.timed([sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"], tmp_path, {})


def test_ratios_follow_from_the_runs(capsys):
    benchmark.compare(benchmark.Result(15, 6_000, 180), benchmark.Result(190, 2_400_000, 180))
    printed = capsys.readouterr().out
    assert "12.7 times the models a second" in printed
    assert "1/400 of the bytes" in printed


def test_only_missing_modules_are_put_in_place(tmp_path):
    benchmark.write_empty_modules(tmp_path)
    for name in ("rebasin", "torchvision"):
        installed = benchmark.importlib.util.find_spec(name) is not None
        assert (tmp_path / name / "__init__.py").exists() != installed
    assert not (tmp_path / "torch").exists()
    assert torch.__name__ == "torch"


def test_without_the_published_code_our_own_figures_are_printed(capsys):
    benchmark.main(["--published", "nowhere", "--models", "7"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("zoo of 7 models, 21 checkpoints")
    assert lines[1].split()[0] == "ours"
    assert "checkpoints/s" in lines[1]
    assert "no published code at nowhere" in lines[2]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        benchmark.parse(["--help"])
    assert "runs unmodified" in capsys.readouterr().out
