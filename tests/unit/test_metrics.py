"""Aggregates of the score matrix, against hand-worked examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.metrics import answers, score_matrix

SCORES = [  # three tasks; the second and third have a score before training
    [None, 0.50, 0.20],
    [0.80, 0.55, None],
    [0.60, 0.90, 0.30],
    [0.70, 0.85, 0.95],
]


def test_hand_worked_matrix():
    found = score_matrix.aggregates(SCORES, ["accuracy"] * 3, {})
    assert found["average_accuracy"] == pytest.approx((0.70 + 0.85 + 0.95) / 3)
    assert found["learning_accuracy"] == pytest.approx((0.80 + 0.90 + 0.95) / 3)
    assert found["backward_transfer"] == pytest.approx(((0.70 - 0.80) + (0.85 - 0.90)) / 2)
    assert found["forgetting"] == pytest.approx(((0.80 - 0.70) + (0.90 - 0.85)) / 2)
    assert found["forward_transfer"] == pytest.approx(((0.55 - 0.50) + (0.30 - 0.20)) / 2)


def test_text_columns_have_their_own_aggregates_where_negative_means_forgetting():
    scores = [[4.0, 5.0], [3.0, 5.1], [3.4, 4.0]]
    found = score_matrix.aggregates(scores, ["nll", "nll"], {"wiki": [2.0, 2.1, 2.3]})
    assert found["nll_learning"] == pytest.approx(((4.0 - 3.0) + (5.0 - 4.0)) / 2)
    assert found["nll_backward_transfer"] == pytest.approx(3.0 - 3.4)
    assert found["average_accuracy"] is None
    assert found["perplexity_ratio"] == pytest.approx(2.718281828**0.3)


def test_one_task_has_no_transfer_and_joint_has_no_order():
    one = score_matrix.aggregates([[None], [0.9]], ["accuracy"], {})
    assert (one["learning_accuracy"], one["backward_transfer"], one["forgetting"]) == (0.9, None, None)
    joint = score_matrix.aggregates([[0.1, 0.2, 0.3], [0.7, 0.8, 0.9]], ["accuracy"] * 3, {})
    assert joint["average_accuracy"] == pytest.approx(0.8)
    assert joint["learning_accuracy"] is joint["backward_transfer"] is joint["forgetting"] is None


def test_missing_cell_gives_none_not_a_wrong_number():
    scores = [row[:] for row in SCORES]
    scores[3][0] = None
    found = score_matrix.aggregates(scores, ["accuracy"] * 3, {})
    assert found["average_accuracy"] is None
    assert found["forgetting"] is None
    assert found["learning_accuracy"] is not None


def test_forgetting_is_a_fall_from_the_best_of_the_rows_that_were_scored():
    scores = [[None] * 3, [0.8, None, None], [None, 0.9, None], [0.5, 0.6, 0.7]]
    assert score_matrix.forgetting(scores, [0, 1, 2]) == pytest.approx((0.3 + 0.3) / 2)
    scores[1][0] = None  # what it had learned is not known
    assert score_matrix.forgetting(scores, [0, 1, 2]) is None


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_forgetting_is_never_less_than_the_negative_of_backward_transfer(values):
    a, b, c, d, e, f = values
    scores = [[None] * 3, [a, None, None], [b, c, None], [d, e, f]]
    found = score_matrix.aggregates(scores, ["accuracy"] * 3, {})
    assert found["forgetting"] >= -found["backward_transfer"] - 1e-12


def test_macro_f1_weighs_classes_equally():
    labels = [0] * 9 + [1]
    assert answers.accuracy([0] * 10, labels) == 0.9
    assert answers.macro_f1([0] * 10, labels) == pytest.approx((18 / 19) / 2)
