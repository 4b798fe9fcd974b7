"""Tiny folders of samples of untrained networks of the digits."""

import json

import pytest

from sane_ray.sampling.files import network_file, write_index, write_network, write_rows
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.images import load_images

RECIPE = {
    "model::type": "digits_cnn",
    "model::channels_in": 1,
    "model::o_dim": 10,
    "model::nlin": "tanh",
    "model::dropout": 0.1,
    "model::init_type": "kaiming_uniform",
    "optim::optimizer": "adam",
    "optim::lr": 3e-3,
    "optim::wd": 1e-3,
    "training::batchsize": 64,
    "dataset::name": "digits",
    "dataset::seed": 0,
}


@pytest.fixture(scope="session")
def digits():
    return load_images("digits", seed=0)


@pytest.fixture(scope="session")
def recipe():
    return RECIPE


@pytest.fixture(scope="session")
def write_samples(digits):
    """Writes a folder as jobs/sample.py does; ``broken`` are networks (method, repetition) of which a weight is NaN."""

    def write(folder, methods=("scratch", "sane_kde"), repetitions=2, broken=(), **changes):
        folder.mkdir(parents=True)
        rows = []
        for number, method in enumerate(methods):
            for repetition in range(repetitions):
                weights = from_params({**RECIPE, "seed": 100 * number + repetition}).state_dict()
                if (method, repetition) in broken:
                    weights["module_list.0.weight"][0, 0, 0, 0] = float("nan")
                file = network_file(method, repetition)
                write_network(folder, file, weights, {"method": method})
                rows.append({"method": method, "repetition": repetition, "file": file, "novelty": 0.5})
        write_rows(folder, "samples.parquet", rows)
        index = {
            "identity": "0123abcd",
            "name": "tiny",
            "images": {"name": "digits", "path": "", "fingerprint": digits.fingerprint, "classes": 10},
            "recipe": RECIPE,
            "verdict": [],
        }
        write_index(folder, index | changes)
        return folder

    return write


@pytest.fixture(scope="session")
def strictly():
    """Reads JSON that has no NaN or Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return lambda path: json.loads(path.read_text(), parse_constant=refuse)
