import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional

from sane_ray.errors import InputError
from sane_ray.finetuning.evaluation import METRICS, Evaluation, Piece, ensemble_accuracy
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.stacked import train_stack

TEST_ACC = METRICS.index("test_acc")


def stacked(recipe, *seeds):
    states = [from_params({**recipe, "seed": seed}).state_dict() for seed in seeds]
    return {key: torch.stack([state[key] for state in states]).numpy() for key in states[0]}


def piece(recipe, *seeds, trained_with=7):
    return Piece([{**recipe, "seed": trained_with}] * len(seeds), stacked(recipe, *seeds))


def test_networks_are_measured_as_torch_does(recipe, digits):
    found = Evaluation(digits, 0, [0])(piece(recipe, 1, 2))
    assert found.metrics_REM.shape == (2, 1, len(METRICS))
    assert found.logits_RTIC.shape == (2, 1, len(digits.rows["test"]), 10)
    for place, seed in enumerate((1, 2)):
        net = from_params({**recipe, "seed": seed}).eval()
        for split in ("train", "val", "test"):
            images, labels = (torch.tensor(values) for values in digits.split(split))
            with torch.no_grad():
                logits = net(images)
            row = dict(zip(METRICS, found.metrics_REM[place, 0], strict=True))
            assert row[f"{split}_acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-6)
            assert row[f"{split}_loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), abs=1e-5)
        np.testing.assert_allclose(found.logits_RTIC[place, 0], logits.numpy(), atol=2e-3)


def test_answers_are_kept_at_the_epochs_asked_for_and_give_the_accuracies(recipe, digits):
    found = Evaluation(digits, 3, [0, 2, 9])(piece(recipe, 1, 2, 3))
    assert found.metrics_REM.shape == (3, 4, len(METRICS))
    assert found.logits_RTIC.shape[:2] == (3, 2)
    accuracy_RT = (found.logits_RTIC.argmax(-1) == digits.split("test")[1]).mean(-1)
    np.testing.assert_allclose(
        accuracy_RT, found.metrics_REM[:, [0, 2], TEST_ACC], atol=0.008
    )  # ties of half precision
    assert (found.metrics_REM[:, 3, TEST_ACC] > found.metrics_REM[:, 0, TEST_ACC] + 0.3).all()


def test_without_weights_a_piece_begins_where_its_params_initialise(recipe, digits):
    params = [{**recipe, "seed": seed} for seed in (4, 5)]
    by_params, by_weights = (
        Evaluation(digits, 1, [0, 1])(Piece(params, weights)) for weights in (None, stacked(recipe, 4, 5))
    )
    np.testing.assert_array_equal(by_params.metrics_REM, by_weights.metrics_REM)
    np.testing.assert_array_equal(by_params.logits_RTIC, by_weights.logits_RTIC)


def test_company_and_the_order_of_keys_change_nothing(recipe, digits):
    evaluation = Evaluation(digits, 1, [1])
    together = evaluation(piece(recipe, 1, 2, 3))
    alone = piece(recipe, 3)
    assert alone.weights is not None
    turned = evaluation(Piece(alone.params, dict(reversed(alone.weights.items()))))
    np.testing.assert_array_equal(turned.metrics_REM[0], together.metrics_REM[2])
    np.testing.assert_array_equal(turned.logits_RTIC[0], together.logits_RTIC[2])


def test_what_is_given_stays_as_it_is(recipe, digits):
    given = piece(recipe, 1)
    before = {key: value.copy() for key, value in (given.weights or {}).items()}
    Evaluation(digits, 1, [1])(given)
    for key, value in before.items():
        np.testing.assert_array_equal(value, (given.weights or {})[key])


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_a_broken_network_spoils_no_other(recipe, digits, value):
    broken = piece(recipe, 1, 2, 3)
    assert broken.weights is not None
    broken.weights["module_list.8.weight"][1] = value
    broken.weights["module_list.8.weight"][1, ::2] *= -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Evaluation(digits, 2, [0, 2])(broken)
    sound = Evaluation(digits, 2, [0, 2])(piece(recipe, 1, 3))
    np.testing.assert_array_equal(found.metrics_REM[[0, 2]], sound.metrics_REM)
    np.testing.assert_array_equal(found.logits_RTIC[[0, 2]], sound.logits_RTIC)
    assert not np.isinf(found.logits_RTIC).any()
    if np.isnan(value):
        assert np.isnan(found.metrics_REM[1, :, METRICS.index("train_loss")]).all()
        assert (found.metrics_REM[1, :, TEST_ACC] < 0.2).all()


def test_weights_of_another_network_are_refused(recipe, digits):
    narrow = stacked(recipe, 1)
    narrow["module_list.0.bias"] = narrow["module_list.0.bias"][:, :1]  # a copy would repeat it
    with pytest.raises(InputError, match=r"module_list\.0\.bias is 8, theirs is 1"):
        Evaluation(digits, 0, [0])(Piece([{**recipe, "seed": 0}], narrow))
    del narrow["module_list.0.bias"]
    with pytest.raises(InputError, match="theirs is none"):
        Evaluation(digits, 0, [0])(Piece([{**recipe, "seed": 0}], narrow))


def test_the_evaluation_is_the_stack(recipe, digits):
    given = piece(recipe, 1, 2)
    found = Evaluation(digits, 2, [1])(given)
    states = [from_params({**recipe, "seed": seed}).state_dict() for seed in (1, 2)]
    for place, one in enumerate(train_stack(given.params, digits, [2], weights=states)):
        assert found.metrics_REM[place].tolist() == [[row[name] for name in METRICS] for row in one.results]


# --- ensembles

LOGITS = np.array(
    [
        [[9.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]],  # sure of the first image
        [[0.0, 2.0, 0.0], [0.0, 1.0, 0.0], [3.0, 0.0, 0.0]],
        [[0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 2.0]],
    ],
    dtype=np.float16,
)


def test_ensembles_by_hand():
    # Means of logits: [3, 4/3, 0], [0, 2/3, 1], [1, 0, 4/3]. Of probabilities, those of the first image are
    # (1 + 2 * 0.107) / 3 = 0.40 and (0 + 2 * 0.787) / 3 = 0.52; of the second 0.33 for class 1 and 0.44 for class 2.
    by_logits, by_probabilities = ensemble_accuracy(LOGITS, np.array([0, 2, 2]))
    assert by_logits == 1.0
    assert by_probabilities == pytest.approx(2 / 3)
    assert ensemble_accuracy(LOGITS, np.array([1, 2, 2])) == (pytest.approx(2 / 3), 1.0)


def test_an_ensemble_of_one_is_the_network():
    assert ensemble_accuracy(LOGITS[1:2], np.array([1, 1, 1])) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_a_network_that_is_nan_has_no_say():
    broken = np.concatenate([LOGITS, np.full((1, 3, 3), np.nan, np.float16)])
    labels = np.array([0, 2, 2])
    assert ensemble_accuracy(broken, labels) == ensemble_accuracy(LOGITS, labels)
    assert ensemble_accuracy(broken[3:], labels) == (pytest.approx(1 / 3), pytest.approx(1 / 3))  # answers class 0
