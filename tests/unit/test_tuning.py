"""What Ray Tune is given: proposals with a free worker group each, early ends, and a word when all of it stops."""

import json

import pytest
from ray.tune.search import Searcher

from pipelines.config.loading import parse_config
from pipelines.search import ray_tune
from pipelines.search.ray_tune import Halving, Proposals, Watch
from tests.conftest import minimal

KNOWN = [{"adapter.r": rank} for rank in (2, 4, 8)]


def proposals(groups: int = 2, known=KNOWN, count: int = 3, sampler=None, ended=None) -> Proposals:
    ended = [] if ended is None else ended
    return Proposals(known, count, groups, sampler, lambda number, values: ended.append((number, values)))


def test_a_setting_is_proposed_only_with_a_worker_group_that_is_free():
    ended: list = []
    searcher = proposals(ended=ended)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert {first["slot"], second["slot"]} == {0, 1}
    assert searcher.suggest("c") is None
    searcher.on_trial_complete("b", {"objective": 0.5})
    third = searcher.suggest("c")
    assert third["slot"] == second["slot"]
    assert json.loads(third["values"]) == KNOWN[2]
    assert searcher.suggest("d") == Searcher.FINISHED
    assert ended == [(2, KNOWN[1])]


def test_a_group_is_free_again_however_its_trial_ended():
    searcher = proposals(groups=1)
    searcher.suggest("a")
    searcher.on_trial_complete("a", None, error=True)
    searcher.suggest("b")
    searcher.on_trial_complete("b", {"waiting": True})
    assert searcher.suggest("c")["slot"] == 0


def test_trials_that_break_off_one_after_another_end_the_search_and_a_success_between_does_not():
    searcher = proposals(groups=1, known=[{"adapter.r": n} for n in range(9)], count=9)
    watch = Watch(lambda: None, searcher)
    for name, error in zip("abcdef", (True, True, False, True, True, True), strict=True):
        assert not watch.stop_all()
        searcher.suggest(name)
        searcher.on_trial_complete(name, {"objective": 0.1}, error=error)
    assert watch.stop_all()


def test_a_request_to_stop_ends_the_search_with_its_reason(monkeypatch):
    monkeypatch.setattr(ray_tune, "POLL_SECONDS", -1)
    watch = Watch(lambda: "curlora cancel", proposals())
    assert watch.stop_all()
    assert watch.reason == "curlora cancel"


class Trial:
    def __init__(self, trial_id: str):
        self.trial_id = trial_id


def halving(pruned: list) -> Halving:
    scheduler = Halving(9, 3, pruned.append)
    scheduler.set_search_properties("objective", "max")
    return scheduler


def test_a_trial_behind_the_best_third_at_a_rung_is_told_to_end_and_no_other():
    pruned: list[str] = []
    scheduler = halving(pruned)
    trials = [Trial(name) for name in "abcd"]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    for trial, value in zip(trials, (0.5, 0.9, 0.1, 0.95), strict=True):
        scheduler.on_trial_result(None, trial, {"objective": value, "resource": 1})
    late = Trial("e")
    scheduler.on_trial_add(None, late)
    scheduler.on_trial_result(None, late, {"objective": 0.1, "signal": 0.99, "resource": 1})  # the loss is ahead
    assert pruned == ["c"]
    scheduler.on_trial_result(None, trials[0], {"waiting": True})  # no news is no reason
    scheduler.on_trial_result(None, trials[3], {"objective": 0.9, "resource": 9})  # the end is no early end
    assert pruned == ["c"]


@pytest.fixture
def search(tmp_path):
    space = {
        "training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "adapter.r": {"low": 2, "high": 8},
        "adapter.target_modules": ["all-linear", ["q_proj", "v_proj"]],
        "adapter.whiten": [True, False],
    }
    return parse_config(
        minimal(tmp_path, tmp_path, search={"space": space, "algorithm": "optuna", "trials": 20})
    ).search


def test_optuna_proposes_values_of_the_space_and_learns_from_what_they_gave(search):
    pytest.importorskip("optuna")
    searcher = proposals(1, [], 20, ray_tune.optuna_sampler(search, []))
    drawn = []
    for number in range(20):
        values = json.loads(searcher.suggest(str(number))["values"])
        worth = -abs(values["training.learning_rate"] - 1e-2)
        searcher.on_trial_result(str(number), {"objective": worth, "training_iteration": 1})
        searcher.on_trial_complete(str(number), {"objective": worth, "training_iteration": 1})
        drawn.append(values)
    assert all(1e-4 <= v["training.learning_rate"] <= 1e-1 for v in drawn)
    assert all(isinstance(v["adapter.r"], int) for v in drawn)
    assert {json.dumps(v["adapter.target_modules"]) for v in drawn} == {'"all-linear"', '["q_proj", "v_proj"]'}
    assert {v["adapter.whiten"] for v in drawn} == {True, False}
    assert search.trials == len(drawn)


def test_optuna_goes_on_with_the_settings_of_an_earlier_start(search):
    pytest.importorskip("optuna")
    first = proposals(1, [], 2, ray_tune.optuna_sampler(search, []))
    tried = []
    for name in "ab":
        tried.append(json.loads(first.suggest(name)["values"]))
        first.on_trial_complete(name, {"objective": 0.5})
    again = proposals(1, [], 3, ray_tune.optuna_sampler(search, [*tried, {"adapter.r": 4}]))
    for values in tried:
        assert json.loads(again.suggest(str(values))["values"]) == values
        again.on_trial_complete(str(values), {"objective": 0.5})
    assert json.loads(again.suggest("c")["values"]) not in tried
