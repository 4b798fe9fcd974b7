import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import published_step
import train_step

from sane_ray.autoencoder.losses import published_explained_variance
from sane_ray.autoencoder.model import SANE

AUGMENTATIONS = """
import ray
from torchvision.transforms import RandomErasing

class NoiseAugmentation:
    def __init__(self, sigma): self.sigma = sigma

class WindowCutter:
    def __init__(self, windowsize): self.windowsize = windowsize

class TwoViewSplit:
    def __init__(self, stack_1, stack_2, mode, view_1_canon, view_2_canon):
        assert (len(stack_1), len(stack_2), mode, view_1_canon, view_2_canon) == (1, 1, "permutation", True, False)

class AugmentationPipeline:
    def __init__(self, stack): self.stack = stack

@ray.remote(num_returns=1)
def remote_function(): ...
"""

MODULE = """
import logging, torch, tqdm
from einops import repeat
from lightning.fabric import Fabric, seed_everything
from torchmetrics.functional import r2_score, explained_variance

class AEModule(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("the module talks")
        seed_everything(config["seed"])
        assert config["training::precision"] == "amp" and config["model::compile"] is True
        self.shape = config["trainset::batchsize"], 2, config["training::windowsize"], config["ae:i_dim"]
        self.weights = torch.nn.Parameter(torch.zeros(PARAMETERS))
        optimizer = torch.optim.AdamW(self.parameters())
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=config["optim::lr"], total_steps=config["training::steps_per_epoch"], verbose=False
        )

    def set_transforms(self, transforms_train):
        assert len(transforms_train.stack) == 2

    def train_epoch(self, loader):
        for views, mask, positions in loader:
            assert views.shape == self.shape and views.dtype == torch.float32
            assert mask.shape == views[:, 0].shape and mask.dtype == torch.bool
            assert positions.shape == (*views[:, 0].shape[:2], 3)
        return {"batches": len(loader)}
"""


def stand_in(folder, parameters):
    """The shape of the published code: what this benchmark calls of it."""
    for package in ("SANE", "SANE/datasets", "SANE/models"):
        (folder / "src" / package).mkdir(parents=True)
        (folder / "src" / package / "__init__.py").write_text("")
    (folder / "src/SANE/datasets/augmentations.py").write_text(AUGMENTATIONS)
    (folder / "src/SANE/models/def_AE_module.py").write_text(MODULE.replace("PARAMETERS", str(parameters)))
    return folder


def run(code):
    side = train_step.Side(train_step.Work("published", "digits", 2, "bfloat16", "cpu", 1, code))
    try:
        side.run(2)
        return side.run(3)
    finally:
        side.close()


def parameters_of_ours():
    job, _ = train_step.job_of("digits", batch_size=2)
    return sum(parameter.numel() for parameter in SANE(job.autoencoder).parameters())


def test_its_own_epoch_is_run_in_a_process_of_its_own(tmp_path):
    cost = run(stand_in(tmp_path, parameters_of_ours()))
    assert cost.seconds > 0
    assert cost.megabytes > 50
    assert "SANE" not in sys.modules


def test_a_model_of_another_size_is_not_compared(tmp_path):
    with pytest.raises(RuntimeError, match=r"the published model has 5 parameters, ours \d+: nothing to compare"):
        run(stand_in(tmp_path, 5))


def test_settings_are_the_numbers_of_ours():
    job, _ = train_step.job_of("cnn", batch_size=8)
    job = replace(job, pretraining=replace(job.pretraining, learning_rate=3e-4))
    settings = published_step.settings(job, torch.device("cpu"), steps=7)
    assert settings["ae:d_model"] == 1024
    assert settings["ae:i_dim"] == 289
    assert settings["ae:max_positions"] == list(job.autoencoder.max_positions)
    assert settings["trainset::batchsize"] == 8
    assert settings["optim::lr"] == 3e-4
    assert "training::gradient_clipping" not in settings


def test_explained_variance_is_the_published_one():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, 3, 4, generator=generator)
    output = target + 0.3 * torch.randn(5, 3, 4, generator=generator)
    target[:, 0, 0] = 2.0  # constant target, error that varies
    target[:, 1, 1], output[:, 1, 1] = 0.0, 0.0
    found = published_step.explained_variance(output, target, "uniform_average")
    expected = published_explained_variance(output, target, torch.ones(5, 3, 4, dtype=torch.bool))
    torch.testing.assert_close(found, expected)


def test_only_missing_packages_are_put_in_place():
    missing = published_step.missing_packages()
    assert not {"ray", "tqdm"} & set(missing)
    assert set(missing) <= {name for name in published_step.MISSING if "." not in name}
    assert not published_step.is_checkout(Path("nowhere"))


def test_a_checkout_is_known_by_what_is_called(tmp_path):
    assert published_step.is_checkout(stand_in(tmp_path, 1))
