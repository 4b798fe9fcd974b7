"""Networks become tokens as in the model's training, or by what is known of their kinds, or are refused with words."""

import dataclasses

import numpy as np
import pytest
import torch
from embedding_networks import SIZE, first_architecture, known_network, make_model, make_store, other_network, write_zoo
from safetensors.torch import save_file

from sane_ray.embedding.preprocessing import Preprocessing
from sane_ray.errors import InputError
from sane_ray.pretraining.worker import preprocessing_of
from sane_ray.tokens.normalization import Normalization
from sane_ray.tokens.store.reading import settings_of


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    zoo = write_zoo(tmp_path_factory.mktemp("mixed") / "zoo", known=12, other=6)
    return zoo, make_store(zoo, tmp_path_factory.mktemp("mixed") / "store")


def test_a_store_of_training_is_read_as_it_is(known_store):
    (architecture,) = known_store.architectures.values()
    prepared = Preprocessing(make_model(known_store)).of_store(architecture)
    assert prepared.trained_on and prepared.stored is None and prepared.normalization == architecture.normalization


def test_an_architecture_is_known_by_its_layers_whatever_its_name(known_store):
    (architecture,) = known_store.architectures.values()
    renamed = dataclasses.replace(architecture, name="another")
    prepared = Preprocessing(make_model(known_store)).of_store(renamed)
    assert prepared.trained_on and prepared.name == "another"


def test_the_same_networks_normalised_by_other_statistics_are_converted(known_store):
    (architecture,) = known_store.architectures.values()
    scale = architecture.normalization.scale.copy()
    scale[1] *= 2
    stored = Normalization("standardize", architecture.normalization.shift, scale)
    prepared = Preprocessing(make_model(known_store)).of_store(dataclasses.replace(architecture, normalization=stored))
    assert prepared.trained_on and prepared.stored == stored
    assert prepared.normalization == architecture.normalization


def test_another_mode_of_normalisation_is_converted_unless_norms_are_missing(known_zoo, known_store, tmp_path):
    stores = {mode: make_store(known_zoo, tmp_path / mode, normalization=mode) for mode in ("minmax", "l2")}
    architectures = {mode: next(iter(store.architectures.values())) for mode, store in stores.items()}
    for architecture in architectures.values():
        prepared = Preprocessing(make_model(known_store)).of_store(architecture)
        assert prepared.normalization.mode == "standardize" and prepared.stored == architecture.normalization
    with pytest.raises(InputError, match=r"tokens\.normalization minmax, .* with l2: .*--tokens\.normalization l2"):
        Preprocessing(make_model(stores["l2"])).of_store(architectures["minmax"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "dense"}, r"tokens\.layout dense, .* with sparse: .*--tokens\.layout sparse"),
        (
            {"token_size": 30},
            r"tokens have 30 values, but those of the model 24: prepare it with --tokens.token_size 24",
        ),
    ],
)
def test_a_store_prepared_otherwise_is_refused_with_the_option_to_prepare_it_with(
    known_zoo, known_store, tmp_path, settings, message
):
    store = make_store(known_zoo, tmp_path / "store", **settings)
    (architecture,) = store.architectures.values()
    with pytest.raises(InputError, match=message):
        Preprocessing(make_model(known_store)).of_store(architecture)


def test_in_l2_the_mean_norms_of_training_do_not_matter(known_zoo, tmp_path):
    store = make_store(known_zoo, tmp_path / "one", normalization="l2")
    scaled = make_store(write_zoo(tmp_path / "zoo", scale=3.0), tmp_path / "other", normalization="l2")
    (architecture,) = scaled.architectures.values()
    assert Preprocessing(make_model(store)).of_store(architecture).trained_on


@pytest.mark.parametrize("normalization", ["standardize", "minmax", "l2", "none"])
def test_unknown_architectures_are_normalised_like_layers_of_the_same_kind(mixed, tmp_path, normalization):
    store = make_store(mixed[0], tmp_path / "store", normalization=normalization)
    name = first_architecture(store)
    model = make_model(store, names=[name], max_positions=[99, 9, 99])
    prepared = Preprocessing(model).of_weights(other_network())
    assert not prepared.trained_on and prepared.name.startswith("network-")
    known, found = store.architectures[name], prepared.normalization
    assert found.mode == normalization and len(found.scale) == len(prepared.table.layers)
    kinds = [layer.kind for layer in known.table.layers]
    for layer, shift, scale in zip(prepared.table.layers, found.shift, found.scale, strict=True):
        same = kinds.index(layer.kind)  # each kind once: the statistics are those of that layer
        assert shift == pytest.approx(known.normalization.shift[same], abs=1e-12)
        assert scale == pytest.approx(known.normalization.scale[same])
    of_store = Preprocessing(model).of_store(store.architectures[first_architecture(store, "other")])
    assert not of_store.trained_on and np.allclose(of_store.normalization.scale, found.scale)


def test_checkpoints_of_a_known_architecture_may_have_their_keys_in_any_order(known_store):
    weights = known_network()
    backwards = dict(reversed(weights.items()))
    meta = {key: value.to("meta") for key, value in backwards.items()}
    (name,) = known_store.architectures
    prepared = Preprocessing(make_model(known_store)).of_weights(meta)
    assert prepared.trained_on and prepared.name == name


def test_how_training_treated_batch_norm_holds_for_unknown_architectures(known_zoo, tmp_path):
    unknown = known_network()
    unknown["extra.weight"], unknown["extra.bias"] = torch.zeros(3, 4), torch.zeros(3)
    for batch_norm in ("keep", "ignore"):
        store = make_store(known_zoo, tmp_path / batch_norm, batch_norm=batch_norm)
        prepared = Preprocessing(make_model(store, max_positions=[99, 9, 99])).of_weights(unknown)
        assert ("norm" in {layer.kind for layer in prepared.table.layers}) == (batch_norm == "keep")


def test_an_unknown_architecture_beyond_the_position_tables_is_refused_and_fits_a_sinusoidal_model(known_store):
    wide = {"fc.weight": torch.zeros(500, SIZE)}
    with pytest.raises(InputError, match=r"needs 500 positions of the token index, .*sinusoidal"):
        Preprocessing(make_model(known_store)).of_weights(wide)
    model = make_model(known_store, positions="sinusoidal", max_positions=[])
    assert not Preprocessing(model).of_weights(wide).trained_on


def test_a_model_without_preprocessing_is_told(known_store):
    model = make_model(known_store)
    model.preprocessing = {}
    with pytest.raises(InputError, match=r"does not say how weights became tokens.*save_pretrained"):
        Preprocessing(model)


def with_more_layers():
    """Like a known network, and yet another architecture."""
    return known_network() | {"extra.weight": torch.ones(3, 4), "extra.bias": torch.ones(3)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A zoo of networks without batch norm."""
    return write_zoo(tmp_path_factory.mktemp("plain") / "zoo", known=0, other=6)


def store_of(network, folder, **settings):
    """A store of some networks of one architecture."""
    folder.mkdir()
    for number in range(6):
        save_file({key: value + number for key, value in network.items()}, folder / f"n{number}.safetensors")
    return make_store(folder, folder.with_name(f"{folder.name}-store"), **settings)


def test_what_training_did_with_batch_norm_is_known_though_no_network_of_its_had_one(plain, tmp_path):
    for batch_norm in ("ignore", "keep"):
        store = make_store(plain, tmp_path / batch_norm, batch_norm=batch_norm)
        prepared = Preprocessing(make_model(store, max_positions=[99, 9, 99])).of_weights(known_network())
        assert ("norm" in {layer.kind for layer in prepared.table.layers}) == (batch_norm == "keep")


@pytest.mark.parametrize(
    ("option", "trained", "found"),
    [
        ("batch_norm", "ignore", "keep"),
        ("batch_norm", "keep", "ignore"),
        ("parameters", "weights", "all"),
        ("parameters", "all", "weights"),
    ],
)
def test_a_store_with_other_tensors_than_training_would_take_is_refused(plain, tmp_path, option, trained, found):
    model = make_model(make_store(plain, tmp_path / "trained", **{option: trained}), max_positions=[99, 9, 99])
    network = with_more_layers() | {"head.scale": torch.ones(4)}
    store = store_of(network, tmp_path / "zoo", **{option: found})
    (architecture,) = store.architectures.values()
    with pytest.raises(
        InputError, match=rf"tokens\.{option} {found}, .* with {trained}: .*--tokens\.{option} {trained}"
    ):
        Preprocessing(model).of_store(architecture, settings_of(store))
    for name in settings_of(store):
        del model.preprocessing[name]
    assert not Preprocessing(model).of_store(architecture, settings_of(store)).trained_on  # an older model: as before


def test_options_that_change_nothing_of_an_architecture_do_not_matter(known_zoo, tmp_path, plain):
    model = make_model(make_store(known_zoo, tmp_path / "a", batch_norm="ignore"), max_positions=[99, 9, 99])
    store = make_store(plain, tmp_path / "b")
    (architecture,) = store.architectures.values()
    assert not Preprocessing(model).of_store(architecture, settings_of(store)).trained_on


def test_networks_that_are_aligned_otherwise_than_in_training_are_warned_of(known_zoo, tmp_path, known_store):
    aligned = Preprocessing(make_model(make_store(known_zoo, tmp_path / "aligned", align="weights")))
    (warning,) = aligned.warnings_of("none")
    assert "prepared with tokens.align weights, these with none" in warning and "--tokens.align weights" in warning
    (warning,) = aligned.warnings_of("none", alone=True)  # of one network no store is made
    assert "this one with none" in warning and "prepare them" not in warning
    assert not aligned.warnings_of("weights")
    older = make_model(known_store)
    del older.preprocessing["align"]
    assert not Preprocessing(older).warnings_of("weights")


def test_a_trained_model_says_how_its_store_was_prepared(known_zoo, tmp_path):
    store = make_store(known_zoo, tmp_path / "store", batch_norm="ignore", parameters="weights", align="weights")
    said = preprocessing_of(store)
    assert [said[name] for name in ("batch_norm", "parameters", "align")] == ["ignore", "weights", "weights"]
