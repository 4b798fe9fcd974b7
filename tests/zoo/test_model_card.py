import logging

import pytest

from sane_ray.zoo.model_card import ModelCard, read_card


@pytest.fixture
def card(tmp_path):
    def write(text: str | bytes) -> ModelCard:
        path = tmp_path / "README.md"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_card(path)

    return write


FULL = """---
license: apache-2.0
base_model: google/vit-base-patch16-224
language: [en, no]
tags: [vision, image-classification]
datasets:
- imagenet-1k
pipeline_tag: image-classification
library_name: transformers
model-index:
- name: vit
  results:
  - task: {type: image-classification}
    dataset: {name: ImageNet-1k, type: imagenet-1k, split: test}
    metrics:
    - {type: accuracy, value: 0.91, name: Accuracy}
    - {type: loss, value: "0.3"}
    - {type: top5, value: 98.5%}
---
# A card
"""


def test_a_full_card(card):
    assert card(FULL) == ModelCard(
        license="apache-2.0",
        base_models=("google/vit-base-patch16-224",),
        properties={
            "tags": "vision, image-classification",
            "datasets": "imagenet-1k",
            "language": "en, no",  # which YAML reads as a false
            "pipeline_tag": "image-classification",
            "library_name": "transformers",
        },
        metrics={"imagenet_1k.accuracy": 0.91, "imagenet_1k.loss": 0.3, "imagenet_1k.top5": 98.5},
    )


def test_metrics_of_several_configs_of_a_dataset_keep_apart(card):
    found = card("""---
model-index:
- results:
  - dataset: {name: GLUE, type: glue, config: mrpc, split: validation}
    metrics: [{type: accuracy, value: 0.8}, {type: f1, value: 0.7}]
  - dataset: {name: GLUE, type: glue, config: qnli, split: validation}
    metrics: [{type: accuracy, value: 0.9}, {type: accuracy, name: Accuracy (norm), value: 0.6}]
  - metrics: [{type: wer, value: 4}]
---
""").metrics
    assert found == {
        "glue_mrpc_validation.accuracy": 0.8,
        "glue.f1": 0.7,
        "glue_qnli_validation.accuracy": 0.9,
        "glue_qnli_validation.accuracy_accuracy_norm": 0.6,
        "wer": 4,
    }


def test_the_same_metric_twice_is_kept_twice(card):
    metrics = "metrics: [{type: acc, value: 1}, {type: acc, value: 2}]"
    found = card(f"---\nmodel-index:\n- results:\n  - dataset: {{name: A}}\n    {metrics}\n---\n").metrics
    assert found == {"a.acc": 1, "a.acc_again": 2}


@pytest.mark.parametrize(
    ("text", "license_name"),
    [
        ("license: other\nlicense_name: llama3", "llama3"),
        ("license: other", "other"),
        ("license: [mit, cc-by-4.0]", "mit, cc-by-4.0"),
        ("license: 3", None),
    ],
)
def test_licences(card, text, license_name):
    assert card(f"---\n{text}\n---\n").license == license_name


def test_several_base_models(card):
    assert card("---\nbase_model:\n- a/b\n- c/d\n---\n").base_models == ("a/b", "c/d")


def test_windows_line_ends_and_byte_order_marks(card):
    assert card(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\nText").license == "mit"


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: [mit\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['touch owned']\n---\n",
        "---\ndate: 2020-13-45\n---\n",
        "---\na: b: c\n---\n",
    ],
)
def test_front_matter_that_is_no_safe_yaml_is_a_warning(card, text, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert card(text) == ModelCard()
    assert "README.md: its front matter is no YAML" in caplog.text
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "text", ["# no front matter", "", "---\nlicense: mit\nand no end", "---\n- a list\n---\n", b"\xff"]
)
def test_readmes_that_are_no_cards_are_empty(card, text):
    assert card(text) == ModelCard()


def test_facts_of_unexpected_shapes_are_left_out(card):
    text = "license: {a: b}\ntags: {a: 1}\nbase_model: [1, null, a/b]\nmodel-index: [1, {results: 3}, {results: [4]}]\n"
    more = "datasets: [[x], y]\n"
    assert card(f"---\n{text}{more}---\n") == ModelCard(base_models=("a/b",), properties={"datasets": "y"})


def test_a_card_of_model_j(card):
    found = card("""---
base_model: google/vit-base-patch16-224
tags: [model-j, weight-space-learning]
---
# Model-J: SupViT Model (model_idx_0001)

| Attribute | Value |
|---|---|
| **Subset** | SupViT |
| **Split** | val |
| **Base Model** | `google/vit-base-patch16-224` |
| **Dataset** | CIFAR100 (50 classes) |

| Parameter | Value |
|:----|:--:|
| Learning Rate | 3e-4 |
| Seed | 7 |
| Random Flip | True |

| Metric | Value |
|---|---|
| Test Acc | 0.93 |
| a | row | of three |
""")
    assert found.split == "val"
    assert found.base_models == ("google/vit-base-patch16-224",)
    assert found.metrics == {"test_acc": 0.93}
    assert found.config == {
        "card::subset": "SupViT",
        "card::dataset": "CIFAR100 (50 classes)",
        "card::learning_rate": 3e-4,
        "card::seed": 7,
        "card::random_flip": "True",
    }


def test_tables_of_other_cards_are_text(card):
    assert card("---\nlicense: mit\n---\n| a | b |\n|---|---|\n| Split | test |\n") == ModelCard(license="mit")
