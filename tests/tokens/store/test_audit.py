import math

import pytest
import torch

from sane_ray.config import TokensConfig
from sane_ray.tokens.store.audit import audit
from sane_ray.tokens.store.inspection import Found, Seen
from sane_ray.tokens.tokenizer import LayerTable, build_layer_table
from sane_ray.zoo.readers import Record

CONFIG = TokensConfig(split=[0.5, 0.25, 0.25])


def layers(width: int) -> LayerTable:
    return build_layer_table({"fc.weight": torch.zeros(3, width), "fc.bias": torch.zeros(3)}, token_size=width + 1)


def zoo(records: list[Record], digests: list[str] | None = None) -> Found:
    """What pass 1 would have found: every model of an odd number is wider."""
    found = Found.nothing(records)
    tables = [layers(4), layers(8)]
    seen = []
    for record, digest in zip(records, digests or [record.id for record in records], strict=True):
        seen.append(Seen(digest, "", tables[int(record.model[-1]) % 2].fingerprint))
    found.add(range(len(seen)), seen, {table.fingerprint: table for table in tables})
    return found


def records(models: int, epochs: int = 1, **fields: object) -> list[Record]:
    return [
        Record(f"m{model}/{epoch}", f"m{model}", epoch, f"/zoo/m{model}/{epoch}", **fields)
        for model in range(models)
        for epoch in range(epochs)
    ]


def section(text: str, start: str) -> list[str]:
    """The lines that begin with one."""
    return next(part.splitlines() for part in text.split("\n\n") if part.startswith(start))


def test_heading_counts_what_was_found_and_what_can_be_used():
    found = zoo(records(4, epochs=3))
    found.leave_out(2, "fc.weight holds NaN or infinite values")
    lines = section(audit(found, [], CONFIG, source="/zoo", sizes=[5e5] * 12), "zoo /zoo")
    assert lines[1:] == [
        "  read by  tune (12)",
        "  found    12 checkpoints of 4 models, epochs 0 to 2 (3 different), 6.0 MB",
        "  usable   11 checkpoints of 4 models",
    ]


def test_architectures_have_counts_parameters_and_an_example():
    lines = section(audit(zoo(records(5, epochs=2)), [], CONFIG, source="/zoo"), "architecture")
    assert lines[0].split() == [
        "architecture",
        "models",
        "checkpoints",
        "parameters",
        "layers",
        "symmetry",
        "for",
        "example",
    ]
    assert lines[1].split()[1:] == ["3", "6", "15", "1", "none", "known", "m0/0"]
    assert lines[2].split()[1:] == ["2", "4", "27", "1", "none", "known", "m1/0"]


def test_what_is_left_out_is_grouped_by_reason():
    found = zoo(records(6, epochs=2))
    found.leave_out(0, "is empty")
    found.leave_out(3, "is empty")
    found.pass_over(5, "has a weight of size 17.5, above tokens.weight_threshold")
    found.pass_over(7, "has a weight of size 1e+03, above tokens.weight_threshold")
    found.pass_over(9, "has the same weights as m0/1")
    found.pass_over(11, "has the same weights as m1/0")
    filtered = [(Record("x/0", "x", 0, "/zoo/x"), "acc is missing")]
    lines = section(audit(found, filtered, CONFIG, source="/zoo"), "left out")
    assert lines[0] == "left out: 7 of 13 checkpoints"
    assert [line.split(maxsplit=2) for line in lines[2:]] == [
        ["2", "m0/0", "is empty"],
        ["2", "m2/1", "has a weight of size 17.5, above tokens.weight_threshold"],
        ["2", "m4/1", "has the same weights as m0/1"],
        ["1", "x/0", "acc is missing"],
    ]


def test_a_zoo_that_cannot_be_used_at_all_is_still_described():
    found = zoo(records(2))
    for position in range(2):
        found.leave_out(position, "is empty")
    text = audit(found, [], CONFIG, source="/zoo")
    assert "usable   0 checkpoints of 0 models" in text
    assert "2  m0/0         is empty" in text
    assert "train, val, test would hold no model" in text


def test_copies_within_and_across_models():
    found = zoo(records(4, epochs=2), ["a", "a", "b", "c", "c", "b", "c", ""])
    lines = section(audit(found, [], CONFIG, source="/zoo"), "duplicates")
    assert lines[0] == (
        "duplicates: 4 checkpoints have the weights of an earlier one, in 3 groups: 1 within one model, 2 across models"
    )
    assert set(lines) >= {"  m0/0 = m0/1", "  m1/0 = m2/1", "  m1/1 = m2/0 = m3/0"}
    assert audit(zoo(records(3)), [], CONFIG, source="/zoo").count("duplicates: none") == 1


def test_copies_in_different_splits_are_told():
    found = zoo([Record(f"m{i}/0", f"m{i}", 0, "/zoo") for i in (0, 2)], ["same", "same"])
    text = audit(found, [], TokensConfig(split=[0.5, 0.5, 0.0]), source="/zoo")
    assert "1 groups have models in different splits; keep tokens.duplicates at 'drop'" in text


def test_licences_and_lineage():
    zoo_records = [
        Record("m0/0", "m0", 0, "/zoo/0", license="mit", parents=("org/base",)),
        Record("m0/1", "m0", 1, "/zoo/1", license="mit", parents=("org/base",)),
        Record("m1/0", "m1", 0, "/zoo/2", license="apache-2.0", parents=("org/base", "org/other")),
        Record("m2/0", "m2", 0, "/zoo/3", license=""),
    ]
    text = audit(zoo(zoo_records), [], CONFIG, source="/zoo")
    assert [line.split() for line in section(text, "licence")[1:]] == [
        ["none", "named", "1", "1"],
        ["mit", "1", "2"],
        ["apache-2.0", "1", "1"],
    ]
    assert [line.split() for line in section(text, "made from")[1:]] == [["org/base", "2"], ["org/other", "1"]]
    assert "made from" not in audit(zoo(records(2)), [], CONFIG, source="/zoo")


def test_files_that_no_record_stands_for():
    text = audit(zoo(records(2)), [], CONFIG, source="/zoo", unclaimed=[f"x{i}.pt" for i in range(30)])
    (line,) = section(text, "passed over")
    assert line.startswith("passed over: 30 files that look like weights")
    assert "for example x0.pt, x1.pt, x2.pt, x3.pt, x4.pt; --reader files reads them" in line


def test_splits_that_would_result():
    found = zoo(records(8, epochs=2))
    lines = section(audit(found, [], TokensConfig(split=[1.0, 0.0, 0.0]), source="/zoo"), "split")
    assert [line.split() for line in lines[1:]] == [["train", "8", "16"], ["val", "0", "0"], ["test", "0", "0"]]


def test_published_split_of_some_models():
    zoo_records = [Record(f"m{i}/0", f"m{i}", 0, "/zoo", split=part) for i, part in enumerate(["train", "test", None])]
    lines = section(audit(zoo(zoo_records), [], TokensConfig(split_by="published"), source="/zoo"), "split")
    assert [line.split()[-2:] for line in lines[1:]] == [["1", "1"], ["0", "0"], ["1", "1"], ["1", "1"]]
    assert lines[-1].startswith("in none")


@pytest.mark.parametrize("split_by", ["published", "nothing"])
def test_a_split_that_would_be_refused_is_told(split_by: str):
    (line,) = section(audit(zoo(records(3)), [], TokensConfig(split_by=split_by), source="/zoo"), "split")
    assert line.startswith(f"split: refused, because config field tokens.split_by is '{split_by}'")


def test_what_is_known_of_the_checkpoints():
    properties = [{"acc": 0.5, "note": "x"}, {"acc": math.nan}, {"acc": 0.75}]
    zoo_records = [Record(f"m{i}/0", f"m{i}", 0, "/zoo", known, {"seed": i}) for i, known in enumerate(properties)]
    lines = section(audit(zoo(zoo_records), [], CONFIG, source="/zoo"), "known")
    assert [line.split(maxsplit=2) for line in lines[1:]] == [
        ["property.acc", "2", "0.5 to 0.75"],
        ["property.note", "1", "x"],
        ["config.seed", "3", "0 to 2"],
    ]


def test_long_lists_are_cut():
    zoo_records = [Record(f"m{i}/0", f"m{i}", 0, "/zoo", license=f"licence {i}") for i in range(30)]
    text = audit(zoo(zoo_records, ["same"] * 30), [], CONFIG, source="/zoo")
    assert section(text, "licence")[-1] == "  and 10 more licences"
    assert section(text, "duplicates")[-1].endswith("m4/0 and 25 more")


def test_files_of_formats_that_are_not_read():
    names = [*(f"x{i}.onnx" for i in range(7)), "y.jit", "z.pt"]
    text = audit(zoo(records(2)), [], CONFIG, source="/zoo", unclaimed=names)
    graphs, script = section(text, "not read")
    assert graphs.startswith(
        "not read: 7 files (x0.onnx, x1.onnx, x2.onnx, x3.onnx, x4.onnx, …), each is an ONNX graph"
    )
    assert script.startswith("not read: 1 files (y.jit), each is a TorchScript archive")
    assert "torch.jit.load" in script and script.endswith("/zoo/y.jit /zoo/y.safetensors")
    (line,) = section(text, "passed over")
    assert line.startswith("passed over: 1 files") and "z.pt" in line
