import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sane_ray.autoencoder.model import SANE, Block, attend
from sane_ray.config import AutoencoderConfig
from sane_ray.errors import InputError
from sane_ray.tokens.normalization import LayerStatistics, fit
from sane_ray.tokens.tokenizer import build_layer_table, tokenize

CONFIG = AutoencoderConfig(
    token_size=24, window=12, d_model=32, heads=4, layers=2, latent_dim=8, max_positions=[64, 8, 16], projection_dim=10
)


def inputs(windows=3, tokens=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(size, (windows, tokens), generator=generator) for size in CONFIG.max_positions]
    return torch.randn(windows, tokens, CONFIG.token_size, generator=generator), torch.stack(columns, dim=-1)


def preprocessing_of(networks, mode="standardize", token_size=24):
    """As pretraining writes it: architecture name to layer table and normalisation, after a trip through JSON."""
    architectures = {}
    for name, network in networks.items():
        table = build_layer_table(network, token_size=token_size)
        normalization = fit(LayerStatistics().update(tokenize(network, table), table), mode)
        architectures[name] = {"table": table.to_dict(), "normalization": normalization.to_dict()}
    return json.loads(json.dumps({"token_size": token_size, "architectures": architectures}))


def model_for(networks, mode="standardize", **changes):
    sizes = [build_layer_table(network, token_size=24).position_sizes for network in networks.values()]
    model = SANE(dataclasses.replace(CONFIG, max_positions=np.max(sizes, axis=0).tolist(), **changes)).eval()
    model.preprocessing = preprocessing_of(networks, mode)
    return model


class Lossless(SANE):
    """Embeds tokens as themselves, so that everything around the network can be tested to the bit."""

    def _encode(self, tokens_BWT, place_BWD):
        return tokens_BWT

    def _decode(self, z_BWL, place_BWD):
        return z_BWL


@pytest.fixture
def network(parity):
    return load_file(parity / "cnn_a.safetensors")


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (
            {"token_size": 289, "window": 64, "d_model": 1024, "heads": 8, "max_positions": [100, 10, 40]},
            202_539_421,
        ),
        (
            {"token_size": 288, "window": 256, "d_model": 2048, "heads": 16, "max_positions": [55000, 100, 550]},
            865_050_012,
        ),
    ],
)
def test_published_configs_have_the_published_number_of_parameters(shape, parameters):
    with torch.device("meta"):
        model = SANE(AutoencoderConfig(layers=8, latent_dim=128, **shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("missing", "field"), [("token_size", 0), ("max_positions", [])])
def test_an_unresolved_config_is_refused(missing, field):
    with pytest.raises(InputError, match=f"autoencoder.{missing}"):
        SANE(dataclasses.replace(CONFIG, **{missing: field}))


def test_initial_weights_have_the_published_distribution():
    model = SANE(dataclasses.replace(CONFIG, d_model=256, token_size=200, layers=8))
    stds = {name: parameter.std().item() for name, parameter in model.named_parameters()}
    assert stds["encoder.3.attention.qkv.weight"] == pytest.approx(0.02, rel=0.02)
    assert stds["positions.token.weight"] == pytest.approx(0.02, rel=0.02)
    assert stds["encoder.0.attention.out.weight"] == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert stds["decoder.7.feed_forward.down.weight"] == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    weights = model.state_dict()
    assert all((weights[name] == 1).all() for name in weights if "norm" in name and name.endswith("weight"))
    assert all((weights[name] == 0).all() for name in weights if name.endswith("bias"))
    assert {name for name in weights if name.endswith("bias")} == {
        *(f"{name}.bias" for name in ("token_in", "to_latent", "from_latent", "token_out")),
        *(f"projection_head.norm_{i}.bias" for i in (1, 2)),
    }


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = SANE(CONFIG, seed=3).state_dict()
    torch.manual_seed(2)
    with torch.device("meta"):
        model = SANE(CONFIG)
    model.to_empty(device="cpu")
    model.init_weights(seed=3)
    other = SANE(CONFIG, seed=4).state_dict()
    assert all(torch.equal(first[name], weight) for name, weight in model.state_dict().items())
    assert not torch.equal(first["token_in.weight"], other["token_in.weight"])


def test_forward_is_encode_decode_and_project():
    model, (tokens, positions) = SANE(CONFIG), inputs()
    z, y, projection = model(tokens, positions)
    assert (z.shape, y.shape, projection.shape) == ((3, 12, 8), (3, 12, 24), (3, 10))
    assert torch.equal(z, model.encode(tokens, positions))
    assert torch.equal(y, model.decode(z, positions))
    assert torch.equal(projection, model.project(z))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_blocks_are_compiled_without_a_break_and_recomputed_to_the_bit(precision):
    block = Block(32, 4, dropout=0.0)
    x = torch.randn(2, 12, 32, requires_grad=True)
    ways = (
        block,
        torch.compile(block, backend="eager", fullgraph=True),
        lambda x: checkpoint(block, x, use_reentrant=False),
    )
    results = []
    for way in ways:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            y = way(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()])))
    for result in results[1:]:
        assert all(torch.equal(value, expected) for value, expected in zip(result, results[0], strict=True))


def test_any_length_is_encoded_and_decoded_but_only_a_training_window_projected():
    model = SANE(CONFIG)
    for length in (1, 5, 31):
        tokens, positions = inputs(tokens=length)
        z = model.encode(tokens, positions)
        assert model.decode(z, positions.int()).shape == tokens.shape
        with pytest.raises(InputError, match=rf"{length} tokens.*autoencoder.window = 12"):
            model.project(z)
        with pytest.raises(InputError, match=r"autoencoder.window"):
            model(tokens, positions)


def test_attention_stays_within_a_window_and_sees_all_of_it():
    model, (tokens, positions) = SANE(CONFIG), inputs()
    changed = tokens.clone()
    changed[1, 7] += 1
    difference = (model.encode(changed, positions) - model.encode(tokens, positions)).abs().sum(dim=-1)
    assert (difference[1] > 0).all()
    assert (difference[[0, 2]] == 0).all()


def test_bfloat16_attention_on_the_cpu_trains_as_the_exact_one():
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 9, 16, requires_grad=True) for _ in range(3)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    direction = torch.randn(2, 3, 9, 16)
    expected = F.scaled_dot_product_attention(*exact)
    found = attend(*rounded, 0.0, training=True)
    (expected * direction).sum().backward()
    (found.float() * direction).sum().backward()
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    for tensor, reference in zip(rounded, exact, strict=True):
        torch.testing.assert_close(tensor.grad.float(), reference.grad, atol=0.06, rtol=0.06)
    with torch.no_grad():
        assert torch.equal(attend(*rounded, 0.0, training=True), found)
    assert torch.equal(attend(*rounded, 0.999, training=False), F.scaled_dot_product_attention(*rounded))
    assert (attend(*rounded, 0.999, training=True) == 0).float().mean() > 0.5


def test_dropout_acts_in_training_only():
    model, (tokens, positions) = SANE(dataclasses.replace(CONFIG, dropout=0.5)), inputs()
    plain = SANE(CONFIG).encode(tokens, positions)
    assert not torch.equal(model.train().encode(tokens, positions), plain)
    assert torch.equal(model.eval().encode(tokens, positions), plain)


@pytest.mark.parametrize(("column", "name"), [(0, "token index"), (1, "layer"), (2, "channel")])
@pytest.mark.parametrize("too_low", [False, True])
def test_a_position_beyond_its_table_is_named(column, name, too_low):
    model, (tokens, positions) = SANE(CONFIG), inputs()
    wrong = -1 if too_low else CONFIG.max_positions[column]
    positions[2, 3, column] = wrong
    for call in (lambda: model.encode(tokens, positions), lambda: model.decode(torch.zeros(3, 12, 8), positions)):
        with pytest.raises(InputError, match=rf"{name} {wrong} is not in.*max_positions\[{column}\]"):
            call()


def test_tensors_of_the_wrong_shape_are_named():
    model, (tokens, positions) = SANE(CONFIG), inputs()
    with pytest.raises(InputError, match=r"tokens have shape.*24\] \(autoencoder.token_size\)"):
        model.encode(tokens[..., :20], positions)
    with pytest.raises(InputError, match=r"autoencoder.latent_dim"):
        model.decode(tokens, positions)
    with pytest.raises(InputError, match=r"positions are torch.int64"):
        model.encode(tokens, positions[:, :5])
    with pytest.raises(InputError, match=r"positions are torch.float32"):
        model.encode(tokens, positions.float())


def test_blocks_compile_without_a_break():
    model, (tokens, positions) = SANE(CONFIG), inputs()
    expected = model(tokens, positions)
    for block in model.blocks():
        block.compile(backend="eager", fullgraph=True)
    assert len(model.blocks()) == 4
    assert all(torch.allclose(a, b) for a, b in zip(model(tokens, positions), expected, strict=True))


def test_flops_are_those_that_torch_counts():
    config = dataclasses.replace(CONFIG, token_size=48, d_model=64, window=32)
    model = SANE(config)
    tokens, positions = torch.randn(6, 32, 48), torch.zeros(6, 32, 3, dtype=torch.int32)
    # The math kernel, because the formula counts the products of attention once, and a fused kernel recomputes some.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, y, projection = model(tokens, positions)
        (y.sum() + projection.sum()).backward()
    counted = counter.get_total_flops() / (6 * 32)
    # What the formula leaves out: the tokens need no gradient, and the projection head costs a little.
    no_input_gradient = 2 * config.token_size * config.d_model
    projection_head = 6 * (config.latent_dim * config.projection_dim + config.projection_dim**2 / config.window)
    assert model.flops_per_token(32) == counted + no_input_gradient - projection_head
    assert model.flops_per_token(32) == pytest.approx(counted, rel=0.02)


def test_a_saved_model_comes_back_to_the_bit(tmp_path):
    model, (tokens, positions) = SANE(dataclasses.replace(CONFIG, dropout=0.1)), inputs()
    model.save_pretrained(tmp_path / "runs" / "model", {"token_size": 24, "architectures": {}})
    loaded = SANE.from_pretrained(tmp_path / "runs" / "model")
    assert loaded.config == model.config
    assert loaded.preprocessing == {"token_size": 24, "architectures": {}}
    assert not loaded.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(model(tokens, positions), loaded(tokens, positions), strict=True))


def test_a_model_replaces_a_model_and_leaves_nothing_else(tmp_path):
    SANE(CONFIG, seed=1).save_pretrained(tmp_path / "model", {"token_size": 24})
    second = SANE.from_pretrained(tmp_path / "model")
    second.init_weights(seed=2)
    second.save_pretrained(tmp_path / "model")
    third = SANE.from_pretrained(tmp_path / "model")
    assert torch.equal(third.token_in.weight, SANE(CONFIG, seed=2).token_in.weight)
    assert third.preprocessing == {"token_size": 24}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model", "model.safetensors"]


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match=r"holds other files \(notes.txt\)"):
        SANE(CONFIG).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is a file"):
        SANE(CONFIG).save_pretrained(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_save_that_fails_leaves_the_model_that_was_there(tmp_path):
    SANE(CONFIG, seed=1).save_pretrained(tmp_path / "model")
    broken = SANE(CONFIG, seed=2)
    broken.token_in.weight = torch.nn.Parameter(broken.token_in.weight.to("meta"))
    with pytest.raises(Exception, match=r"meta"):
        broken.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"preprocessing or provenance cannot be written to .*config.json"):
        SANE(CONFIG, seed=2).save_pretrained(tmp_path / "model", {"table": {1, 2}})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(SANE.from_pretrained(tmp_path / "model").token_in.weight, SANE(CONFIG, seed=1).token_in.weight)


def save_and_be_killed(folder, before):
    """Saves a second model in a process that is killed just before it does what ``before`` names."""
    events = iter(["os.rename", "os.rename", "shutil.rmtree"][:before])
    wanted = next(events)

    def kill(event, _):
        nonlocal wanted
        if event == wanted and (wanted := next(events, "")) == "":
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    SANE(CONFIG, seed=2).save_pretrained(folder)


@pytest.mark.parametrize("before", [1, 2, 3], ids=["the old one is moved", "the new one is moved", "the old one goes"])
def test_a_save_that_is_killed_loses_no_model_and_its_traces_go_with_the_next_save(tmp_path, caplog, before):
    folder, others = (
        tmp_path / "model",
        [".model.01234567.bak", ".model.0123", ".models.01234567", ".model.89abcdef.old"],
    )
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / others[-1] / "notes.txt").write_text("keep")
    SANE(CONFIG, seed=1).save_pretrained(folder)
    process = multiprocessing.get_context("fork").Process(target=save_and_be_killed, args=(folder, before))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert folder.is_dir() == (before != 2)
    assert len(list(tmp_path.iterdir())) == len(others) + 2
    there = SANE.from_pretrained(folder)
    assert torch.equal(there.token_in.weight, SANE(CONFIG, seed=2 if before == 3 else 1).token_in.weight)
    assert ("is missing" in caplog.text) == (before == 2)
    broken = SANE(CONFIG, seed=3)
    broken.token_in.weight = torch.nn.Parameter(broken.token_in.weight.to("meta"))
    with pytest.raises(Exception, match=r"meta"):
        broken.save_pretrained(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "model"])
    assert torch.equal(SANE.from_pretrained(folder).token_in.weight, there.token_in.weight)


def edit_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    content["autoencoder"].update(changes.pop("autoencoder", {}))
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model.safetensors is missing"),
        (lambda folder: cut_short(folder / "config.json"), r"config.json is not JSON"),
        (
            lambda folder: cut_short(folder / "model.safetensors"),
            r"model.safetensors is not a safetensors file",
        ),
        (lambda folder: edit_config(folder, format="other"), r"config.json is not a sane_ray autoencoder"),
        (lambda folder: edit_config(folder, format_version=99), r"format_version is 99, this sane_ray reads 1"),
        (lambda folder: edit_config(folder, autoencoder={"depth": 3}), r"autoencoder has unknown depth"),
        (lambda folder: edit_config(folder, autoencoder={"token_size": 25}), r"token_in.weight has shape \[32, 24\]"),
        (lambda folder: edit_config(folder, autoencoder={"layers": 3}), r"lacks decoder.2.attention.out.weight.*more"),
        (lambda folder: edit_weights(folder, lambda w: w.pop("token_in.bias")), r"safetensors lacks token_in.bias"),
        (lambda folder: edit_weights(folder, lambda w: w.update(x=w["token_in.bias"] + 1)), r"has unknown x"),
    ],
)
def test_a_damaged_model_folder_is_named(tmp_path, damage, message):
    SANE(CONFIG).save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        SANE.from_pretrained(tmp_path / "model")


WHERE = r"; name the folder of a run \(results/runs/<run>\), or the folder model/ inside it, which holds config\.json"


def test_a_missing_model_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"nowhere does not exist{WHERE}"):
        SANE.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is empty"),
        (["a.txt", "b.txt", "c.txt", "d.pt", "e.md"], r"holds a\.txt, b\.txt, c\.txt and 2 more, and no model"),
        (["a.pt", "sub/b.pt"], r"holds a\.pt, sub/, and no model"),
        (["store.json", "models.parquet"], "is a token store"),
        (["embeddings.json"], "holds embeddings"),
        (["run.json", "history.jsonl"], r"is a run that has not written its model yet \(.*\)"),
    ],
)
def test_a_folder_without_a_model_is_told_by_what_it_holds(tmp_path, files, message):
    folder = tmp_path / "named" / "here"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=rf"config\.json is missing: .*here {message}{WHERE}") as refusal:
        SANE.from_pretrained(folder)
    assert "near it" not in str(refusal.value)


def test_runs_near_a_folder_without_a_model_are_listed(tmp_path):
    runs = tmp_path / "runs"
    for name in ("one", "two", "three", "four"):
        SANE(CONFIG).save_pretrained(runs / name / "model")
    SANE(CONFIG).save_pretrained(tmp_path / "alone")
    (tmp_path / "model" / "config.json").mkdir(parents=True)  # no model
    with pytest.raises(InputError) as refusal:
        SANE.from_pretrained(runs)
    assert str(refusal.value).endswith(f"; near it are {runs / 'four'}, {runs / 'one'}, {runs / 'three'} and 1 more")
    with pytest.raises(InputError) as refusal:
        SANE.from_pretrained(runs / "fuor")
    assert "fuor does not exist; name the folder of a run" in str(refusal.value)
    assert f"near it are {runs / 'four'}, " in str(refusal.value)
    (runs / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is empty.*near it are .*runs/four"):
        SANE.from_pretrained(runs / "empty")
    (runs / "file").touch()
    with pytest.raises(InputError, match=r"file is a file; name the folder"):
        SANE.from_pretrained(runs / "file")
    with pytest.raises(InputError, match=r"near it are .*alone, .*runs/four"):
        SANE.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", ["", '{"layout": 1, "zoo": {}, "images": {}}'])
def test_a_zoo_is_no_model(tmp_path, config):
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    for number in range(2):
        (zoo / f"{number}.pt").touch()
    if config:  # as jobs/build_zoo.py writes it
        (zoo / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"zoo is a zoo of checkpoints, .*by --source .*jobs/pretrain\.py"):
        SANE.from_pretrained(zoo)


@pytest.mark.parametrize("mode", ["standardize", "minmax", "l2", "none"])
@pytest.mark.parametrize("file", ["cnn_a.safetensors", "small_bn.safetensors"])
@pytest.mark.parametrize("window", [12, 500])
def test_a_lossless_model_gives_a_network_back(parity, mode, file, window):
    network = load_file(parity / file)
    plain = model_for({"net": network}, mode, window=window, latent_dim=24)
    model = Lossless(plain.config)
    model.preprocessing = plain.preprocessing
    doubled = {key: value * 2 if value.is_floating_point() else value for key, value in network.items()}
    z = model.encode_model(doubled)
    decoded = model.decode_model(z, doubled)
    assert list(decoded) == list(doubled)
    for key, value in doubled.items():
        assert decoded[key].dtype == value.dtype
        torch.testing.assert_close(decoded[key], value, rtol=1e-5, atol=1e-6)
    alone = model.decode_model(z)
    assert alone.keys() == {key for key in doubled if not key.endswith("num_batches_tracked")}
    truth = network if mode == "l2" else doubled  # l2 keeps no norms; without a reference they are the training mean
    for key, value in alone.items():
        torch.testing.assert_close(value, truth[key], rtol=1e-5, atol=1e-6)


def test_encode_model_normalises_and_encodes_window_by_window(network):
    model = model_for({"net": network})
    table = build_layer_table(network, token_size=24)
    normalization = fit(LayerStatistics().update(tokenize(network, table), table), "standardize")
    tokens, _ = normalization.normalize(tokenize(network, table), table)
    positions = torch.from_numpy(table.positions)
    z = model.encode_model(network)
    assert z.shape == (table.num_tokens, 8)
    assert table.num_tokens % 12 != 0
    last = table.num_tokens // 12 * 12
    for start, stop, first in [(0, 12, 0), (12, 24, 12), (last, table.num_tokens, table.num_tokens - 12)]:
        expected = model.encode(tokens[None, first : first + 12], positions[None, first : first + 12])[0]
        torch.testing.assert_close(z[start:stop], expected[start - first :], rtol=1e-4, atol=1e-6)


def test_encode_model_ignores_dropout_and_the_order_of_keys(network):
    model = model_for({"net": network}, dropout=0.5).train()
    z = model.encode_model(network)
    assert model.training
    assert torch.equal(z, model.encode_model(dict(sorted(network.items()))))
    assert not z.requires_grad


def test_a_bfloat16_model_takes_and_gives_float32(network):
    model = model_for({"net": network})
    z = model.encode_model(network)
    model.bfloat16()
    low = model.encode_model(network)
    assert low.dtype == torch.float32
    assert (low - z).norm() < 0.05 * z.norm()
    assert model.decode_model(low)["module_list.0.weight"].dtype == torch.float32


def test_a_network_goes_with_its_architecture(parity, network):
    other = load_file(parity / "small_bn.safetensors")
    model = model_for({"cnn": network, "bn": other})
    for state_dict in (network, other):
        z = model.encode_model(state_dict)
        assert set(model.decode_model(z)) <= set(state_dict)
        assert set(model.decode_model(z, state_dict)) == set(state_dict)
    with pytest.raises(InputError, match=r"3 embeddings, but the reference network has"):
        model.decode_model(z[:3], other)
    with pytest.raises(InputError, match=r"no architecture has 3 tokens; known are cnn \(\d+ tokens\), bn \("):
        model.decode_model(z[:3])


def test_a_network_of_another_architecture_is_refused_with_what_is_known(network):
    model = model_for({"my_cnn": network})
    with pytest.raises(InputError, match=r"fits none of .*my_cnn \(state dict lacks module_list.0.weight"):
        model.encode_model({"fc.weight": torch.zeros(3, 4)})
    with pytest.raises(InputError, match=r"my_cnn \(module_list.0.weight has shape"):
        model.encode_model({**network, "module_list.0.weight": torch.zeros(8, 3, 5, 5)})


def test_two_architectures_of_one_length_need_a_reference(network):
    model = model_for({"a": network, "b": {f"net.{key}": value for key, value in network.items()}})
    z = model.encode_model(network)
    with pytest.raises(InputError, match=r"several architectures have \d+ tokens.*pass a reference"):
        model.decode_model(z)
    assert list(model.decode_model(z, network)) == list(network)


def test_a_model_without_preprocessing_says_so(network):
    with pytest.raises(InputError, match=r"no preprocessing"):
        SANE(CONFIG).encode_model(network)
    with pytest.raises(InputError, match=r"no preprocessing"):
        SANE(CONFIG).decode_model(torch.zeros(3, 8))
