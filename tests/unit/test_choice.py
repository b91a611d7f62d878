"""The rule of choice: what a trial is worth, which one wins, which ones none beats."""

import math
from dataclasses import replace

import pytest

from pipelines.search.objective import assess, choose, explanation, pareto, steps_spent
from pipelines.search.table import figure, markdown
from tests.unit.sample_records import cell


def record(number: int, learning: float, lost: float | None, status: str = "finished", **fields) -> dict:
    weight = 1.0
    return {
        "number": number,
        "values": {"training.learning_rate": 10.0**-number},
        "setting": {"adapter": {"r": 8}, "training": {"learning_rate": 10.0**-number}},
        "status": status,
        "learning": learning,
        "retention_loss": lost,
        "objective": learning - weight * (lost or 0.0),
        "steps": 10,
        "total_steps": 10,
        "trainable_parameters": 100,
        "fingerprint": f"f{number}",
        **fields,
    }


def test_objective_is_learning_minus_the_weighted_mean_loss_of_what_was_there():
    cells = [cell("new", value=0.8), cell("old", value=0.6), cell("text", "nll", 4.5)]
    worth = assess(cells, ["new"], {"old": 0.3, "text": 4.2}, weight=0.5)  # lost: 0.1 of score, 0.3 nats
    assert worth.learning == pytest.approx(0.8)
    assert worth.retention_loss == pytest.approx(0.2)
    assert worth.objective == pytest.approx(0.7)
    assert worth.signal == worth.objective
    early = assess([replace(cells[0], loss=0.6), *cells[1:]], ["new"], {"old": 0.3, "text": 4.2}, weight=0.5)
    assert (early.objective, early.signal) == (worth.objective, pytest.approx(-0.6 - 0.1))
    early = assess([replace(cells[0], loss=0.6), *cells[1:]], ["new"], {"old": 0.3, "text": 4.2}, 0.5, train_loss=0.4)
    assert (early.objective, early.signal) == (worth.objective, pytest.approx(-0.4 - 0.1))


def test_text_is_learned_in_nats_and_the_first_task_has_nothing_to_lose():
    worth = assess([cell("new", "nll", 3.5)], ["new"], {}, weight=1.0)
    assert (worth.objective, worth.learning, worth.retention_loss, worth.signal) == (-3.5, -3.5, None, -3.5)


def test_a_score_that_is_no_number_has_no_worth():
    assert assess([cell("new", value=math.nan)], ["new"], {}, weight=1.0) is None


def test_only_whole_trials_win_ties_go_to_the_smaller_then_to_the_earlier():
    early = record(1, 0.9, 0.0, "pruned")
    large = record(2, 0.7, 0.0, trainable_parameters=200)
    later, earlier = record(4, 0.7, 0.0), record(3, 0.7, 0.0)
    assert choose([early, large, later, earlier])["number"] == 3
    assert choose([early]) is None


def test_pareto_set_holds_what_none_beats_in_both():
    records = [record(1, 0.9, 0.3), record(2, 0.7, 0.0), record(3, 0.8, 0.4), record(4, 0.7, 0.1)]
    assert [r["number"] for r in pareto(records)] == [1, 2]
    same = [record(1, 0.5, 0.1), record(2, 0.5, 0.1)]
    assert len(pareto(same)) == 2


def test_steps_count_what_was_spent_against_what_all_would_have_taken():
    records = [record(1, 0.9, 0.0), record(2, 0.1, 0.0, "pruned", steps=3)]
    assert steps_spent(records) == (13, 20)


def test_table_and_figure_show_every_trial_with_what_became_of_it():
    records = [record(1, 0.9, 0.3), record(2, 0.4, 0.0, "pruned", steps=3), record(3, 0.7, None)]
    failed = record(4, None or 0.0, None, "failed") | {"learning": None, "objective": None, "total_steps": None}
    result = {
        "task": "t",
        "trials": [*records, failed],
        "chosen": records[2],
        "pareto": [1, 3],
        "why": explanation(records[2], records, 1.0),
        "rule": "r",
        "steps": {"spent": 23, "whole": 30},
    }
    lines = markdown(result).splitlines()
    assert lines[2].startswith("| 3 ") and "chosen, Pareto" in lines[2]
    assert any("pruned" in line and "3/10" in line for line in lines)
    assert any("failed" in line for line in lines)
    assert "23 of 30 (77%)" in markdown(result)
    assert "2 finished, 1 pruned, 0 failed" in result["why"]
    assert figure(result).startswith(b"\x89PNG")
