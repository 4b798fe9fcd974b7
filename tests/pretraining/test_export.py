import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_training import export_sharded, in_ranks, make_autoencoder

from sane_ray.autoencoder.model import SANE
from sane_ray.errors import InputError
from sane_ray.pretraining.export import Export, apart_from, export

PREPROCESSING = {"token_size": 7, "architectures": {}}


def weights_in(folder):
    return SANE.from_pretrained(folder).state_dict()


def same(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(others[name], w) for name, w in weights.items())


def test_a_model_is_exported_whole_with_its_preprocessing(tmp_path):
    model = make_autoencoder()
    export(model, tmp_path / "model", PREPROCESSING)
    assert same(model.state_dict(), weights_in(tmp_path / "model"))
    assert SANE.from_pretrained(tmp_path / "model").preprocessing == PREPROCESSING


def test_two_ranks_export_what_one_would(tmp_path):
    in_ranks(2, export_sharded, tmp_path)
    expected = make_autoencoder().state_dict()
    assert same(expected, weights_in(tmp_path / "model"))
    assert same(expected, weights_in(tmp_path / "best"))


def test_training_does_not_change_what_is_being_exported(tmp_path):
    model = make_autoencoder()
    best = Export(tmp_path / "best", PREPROCESSING)
    for _ in range(2):
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        best.begin(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        best.finish()
        assert same(before, weights_in(tmp_path / "best"))


def test_what_was_gathered_is_not_copied_again():
    model = make_autoencoder()
    live, gathered = model.state_dict(), {name: weight.clone() for name, weight in model.state_dict().items()}
    assert all(weight is gathered[name] for name, weight in apart_from(model, gathered).items())
    copies = apart_from(model, live)
    assert same(live, copies)
    assert all(copies[name].data_ptr() != weight.data_ptr() for name, weight in live.items())


def test_storage_that_is_away_costs_one_best_model_and_ends_the_last_with_its_name(tmp_path, caplog):
    run = tmp_path / "run"
    run.write_text("no folder")
    model, best = make_autoencoder(), Export(run / "best", PREPROCESSING)
    best.begin(model)
    best.finish()
    assert "training goes on" in caplog.text and caplog.records[-1].levelno == logging.WARNING
    with pytest.raises(InputError, match=r"run/model for 0.2 s .*mend the storage"):
        export(model, run / "model", PREPROCESSING, patience_s=0.2)
    run.unlink()
    best.begin(model)
    best.finish()
    assert same(model.state_dict(), weights_in(run / "best"))
