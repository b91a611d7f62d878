"""What a search tries: every rule at configuration time, and the same settings every time."""

import math
from pathlib import Path

import pytest

from pipelines.config.loading import parse_config, read_yaml
from pipelines.config.search_space import settings, size, trials, with_values
from pipelines.errors import ConfigError
from tests.conftest import minimal

RATE = {"training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}


def search(tmp_path, **fields):
    carry = fields.pop("carry", "continue")
    raw = minimal(tmp_path, tmp_path, adapter={"carry": carry}, search={"space": RATE} | fields)
    return parse_config(raw)


def problems(tmp_path, **fields) -> str:
    with pytest.raises(ConfigError) as error:
        search(tmp_path, **fields)
    return "\n".join(str(problem) for problem in error.value.problems)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"space": {"training.lerning_rate": [1, 2]}}, "unknown key 'lerning_rate', did you mean 'learning_rate'?"),
        ({"space": {"adapter.r": [8, 0]}}, "search.space.adapter.r = 0: adapter.r: found 0: input should be greater"),
        ({"space": {"adapter.r": {"low": 1.0, "high": 8.0}}}, "should be a valid integer"),
        ({"space": {"adapter.selection": ["inverse", "invers"]}}, "did you mean 'inverse'"),
        ({"space": {"resources.workers": [1, 2]}}, "only fields of adapter, strategy, training"),
        ({"space": {"trainng.epochs": [1, 2]}}, "did you mean 'training'?"),
        ({"space": {"adapter.r": [8]}}, "has no choice"),
        ({"space": {"adapter.r": [8, 8]}}, "names a value twice"),
        ({"space": {"training.epochs": {"low": 3, "high": 2}}}, "low 3 is not below high 2"),
        ({"space": {"training.weight_decay": {"low": 0, "high": 1, "log": True}}}, "log needs positive numbers"),
        ({"space": {"training.epochs": 3}}, "search.space.training.epochs: found 3"),
        ({"space": {}}, "search.space"),
        ({"algorithm": "grid"}, "algorithm 'grid' needs a list of values for training.learning_rate"),
        ({"algorithm": "optun"}, "did you mean 'optuna'?"),
        ({"start_with": [{"adapter.r": -1}]}, "adapter.r = -1"),
        ({"trials": 1, "start_with": [{"adapter.r": 4}, {"adapter.r": 8}]}, "trials 1 is fewer than the 2 settings"),
        ({"trial_training": {"learning_rate": 1e-3}}, "trial_training.learning_rate: is also in search.space"),
        ({"trial_training": {"epoch": 1}}, "search.trial_training: training: unknown key 'epoch'"),
        ({"when": "every", "space": {"adapter.r": [4, 8]}}, "or set adapter.carry: fresh"),
        ({"when": "every", "space": {"strategy.name": ["ewc", "replay"]}}, "search it with when: first"),
        ({"when": "every", "space": {"training.max_length": [32, 64]}}, "scored at different lengths"),
        (
            {"space": {"training.batch_size": [16, 9], "training.gradient_accumulation": [1, 2]}},
            "training.batch_size = 9, training.gradient_accumulation = 2: training: batch_size 9 is not a multiple",
        ),
    ],
)
def test_what_makes_no_sense_is_bad_input(tmp_path, fields, expected):
    assert expected in problems(tmp_path, **fields)


def test_the_section_in_the_readme_is_valid(tmp_path):
    readme = (Path(__file__).resolve().parents[2] / "pipelines" / "docs" / "search.md").read_text()
    block = readme.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "search.yaml").write_text(block)
    raw = minimal(tmp_path, tmp_path, strategy={"name": "ilora"}, **read_yaml(tmp_path / "search.yaml"))
    assert len(settings(parse_config(raw).search)) == 12


def test_an_adapter_of_its_own_for_each_task_may_be_searched_before_every_task(tmp_path):
    found = search(tmp_path, when="every", carry="fresh", space={"adapter.r": [4, 8]})
    assert size(found.search) == 2


def test_random_settings_depend_on_the_seed_alone_and_more_trials_keep_the_first(tmp_path):
    space = RATE | {"adapter.r": [4, 8, 16]}
    few, many = (search(tmp_path, space=space, trials=n).search for n in (5, 12))
    assert settings(many)[:5] == settings(few)
    assert len(settings(many)) == 12
    assert settings(search(tmp_path, space=space, trials=5, seed=1).search) != settings(few)
    rates = [values["training.learning_rate"] for values in settings(many)]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert {values["adapter.r"] for values in settings(many)} <= {4, 8, 16}


def test_a_logarithmic_range_gives_every_decade_its_share(tmp_path):
    rates = [v["training.learning_rate"] for v in settings(search(tmp_path, trials=300).search)]
    share = sum(rate < 1e-3 for rate in rates) / len(rates)
    assert 0.25 < share < 0.42


def test_whole_ends_give_whole_numbers_also_on_a_logarithmic_scale(tmp_path):
    for log in (False, True):
        space = {"adapter.r": {"low": 2, "high": 5, "log": log}}
        ranks = [values["adapter.r"] for values in settings(search(tmp_path, space=space).search)]
        assert sorted(ranks) == [2, 3, 4, 5]  # a small space is tried once each, whatever the number of trials
        assert all(isinstance(rank, int) for rank in ranks)


def test_grid_is_every_combination_after_what_it_starts_with(tmp_path):
    space = {"adapter.r": [4, 8], "training.learning_rate": [1e-3, 1e-2]}
    first = {"adapter.r": 8, "training.learning_rate": 1e-2}
    found = settings(search(tmp_path, space=space, algorithm="grid", start_with=[first]).search)
    assert found[0] == first
    assert len(found) == 4
    assert trials(search(tmp_path, space=space, algorithm="grid").search) == 4


def test_optuna_knows_only_what_it_starts_with(tmp_path):
    found = search(tmp_path, algorithm="optuna", start_with=[{"adapter.r": 4}])
    assert settings(found.search) == [{"adapter.r": 4}]
    assert trials(found.search) == 17
    assert size(found.search) == math.inf


def test_a_setting_reaches_strategy_options_and_leaves_the_rest(tmp_path):
    config = search(tmp_path)
    changed = with_values(config, {"strategy.name": "ewc", "strategy.lambda_": 3.0, "adapter.options.bias": "none"})
    assert changed.strategy.options == {"lambda_": 3.0}
    assert changed.adapter.options == {"bias": "none"}
    assert changed.search is None
    assert changed.training == config.training
