"""Before and after the trials: what they may see, where a search lies, what the chain takes over, room for them."""

import pytest

from pipelines.chain.plan import make_plan
from pipelines.config.loading import parse_config
from pipelines.data.held_out import training_view, trial_view
from pipelines.data.sources import load_split
from pipelines.errors import ConfigError
from pipelines.runs.directory import RunDirectory
from pipelines.search.run_search import concurrent
from pipelines.search.step_search import adopt, search_of_step, settings_found
from pipelines.search.trial_spec import Spec
from tests.conftest import WORDS, minimal, write_jsonl
from tests.unit.sample_records import cell, step_record

SPACE = {"training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}


@pytest.fixture
def raw(tmp_path, reviews) -> dict:
    (tmp_path / "config.json").write_text("{}")
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "test"):
        write_jsonl(text / f"{split}.jsonl", [{"text": f"{split} {word}"} for word in WORDS])
    second = {"name": "more", "kind": "classification", "data": str(reviews), "text": "sentence"}
    raw = minimal(tmp_path, reviews, tracking=None, search={"space": SPACE, "trials": 4})
    raw["tasks"].append(second)
    return raw | {"retention": [{"name": "corpus", "data": str(text)}]}


def planned(raw: dict, run: RunDirectory | None = None):
    config = training_view(parse_config(raw))
    run = run or RunDirectory(config.run_uri)
    return config, run, make_plan(config, run, settings_found(run))


def search_of(raw: dict, position: int = 1):
    config, _, plan = planned(raw)
    step = plan.steps[position - 1]
    return search_of_step(config, position, step.parent, plan.base_fingerprint)


def found(target, run: RunDirectory, values: dict, **fields) -> None:
    chosen = {"number": 1, "values": values, "fingerprint": "?", "directory": "?"} | fields
    run.write_json(f"{target.folder}/results.json", {"request": target.request, "chosen": chosen})


# -- data


def test_without_validation_data_a_tenth_of_train_is_kept_from_training_and_judges(raw):
    config = training_view(parse_config(raw))
    viewed = trial_view(config, 1)
    train = load_split(config.tasks[0], "train")["sentence"]
    held = load_split(viewed.tasks[0], "test")["sentence"]
    assert len(train) + len(held) == 24
    assert load_split(viewed.tasks[0], "train")["sentence"] == train  # a trial trains on what the chain trains on
    assert load_split(config.tasks[0], "test")["sentence"] != held


def test_validation_data_judges_where_there_is_any_and_training_stays_whole(raw, reviews):
    write_jsonl(reviews / "validation.jsonl", [{"sentence": "the joke is warm", "label": 1}] * 3)
    config = training_view(parse_config(raw))
    viewed = trial_view(config, 1)
    assert len(load_split(config.tasks[0], "train")) == 24
    assert load_split(viewed.tasks[0], "test")["sentence"] == ["the joke is warm"] * 3


def test_retained_text_is_judged_on_another_split_than_its_scores_come_from(raw):
    viewed = trial_view(training_view(parse_config(raw)), 1)
    assert viewed.retention[0].split == "train"
    raw["retention"][0]["split"] = "train"
    with pytest.raises(ConfigError, match="retention_weight: 0"):
        trial_view(training_view(parse_config(raw)), 1)
    raw["search"]["objective"] = {"retention_weight": 0}
    assert trial_view(training_view(parse_config(raw)), 1).retention == []


# -- where it lies


def test_more_trials_or_another_space_share_the_trials_and_ask_anew(raw):
    target = search_of(raw)
    more = search_of(raw | {"search": raw["search"] | {"trials": 8}})
    wider = search_of(raw | {"search": raw["search"] | {"space": SPACE | {"adapter.r": [4, 8]}}})
    assert target.folder == more.folder == wider.folder
    assert len({target.request, more.request, wider.request}) == 3
    assert (
        search_of(raw | {"search": raw["search"] | {"max_concurrent": 1, "time_budget": 5}}).request == target.request
    )


def test_what_a_trial_is_worth_makes_another_search(raw):
    target = search_of(raw)
    weighted = raw["search"] | {"objective": {"retention_weight": 0.5}}
    shortened = raw["search"] | {"trial_training": {"epochs": 1}}
    assert search_of(raw | {"search": weighted}).folder != target.folder
    assert search_of(raw | {"search": shortened}).folder != target.folder
    assert search_of(raw | {"training": {"epochs": 1}}).folder != target.folder


def test_earlier_tasks_are_retained_unless_they_keep_adapters_of_their_own(raw):
    assert search_of(raw, 2).names == ("more", "reviews", "corpus")
    assert search_of(raw | {"adapter": {"carry": "fresh"}}, 2).names == ("more", "corpus")
    assert search_of(raw, 1).names == ("reviews", "corpus")


# -- the chain


def test_nothing_is_planned_to_run_before_its_setting_is_found(raw):
    _, run, plan = planned(raw)
    assert plan.undecided == 1
    assert plan.missing_steps(run) == []
    found(search_of(raw), run, {"training.learning_rate": 5e-3})
    _, run, plan = planned(raw)
    assert plan.undecided is None
    assert [s.training.learning_rate for s in plan.settings] == [5e-3, 5e-3]


def test_found_values_make_the_fingerprint_of_a_run_configured_by_hand(raw):
    _, run, plan = planned(raw)
    found(search_of(raw), run, {"training.learning_rate": 5e-3, "adapter.r": 4})
    _, _, searched = planned(raw)
    config = training_view(parse_config(raw))
    by_hand = config.model_copy(
        update={
            "search": None,
            "training": config.training.model_copy(update={"learning_rate": 5e-3}),
            "adapter": config.adapter.model_copy(update={"r": 4}),
        }
    )
    assert [s.fingerprint for s in searched.steps] == [s.fingerprint for s in make_plan(by_hand).steps]
    assert searched.steps[0].fingerprint != plan.steps[0].fingerprint


def test_every_task_has_its_own_setting_and_waits_for_its_own_search(raw):
    raw["search"]["when"] = "every"
    config, run, plan = planned(raw)
    found(search_of(raw), run, {"training.learning_rate": 5e-3})
    _, _, plan = planned(raw)
    assert plan.undecided == 2
    assert [step.position for step in plan.missing_steps(run)] == [1]
    second = search_of_step(config, 2, plan.steps[0].fingerprint, plan.base_fingerprint)
    found(second, run, {"training.learning_rate": 1e-3})
    _, _, plan = planned(raw)
    assert [s.training.learning_rate for s in plan.settings] == [5e-3, 1e-3]


def test_a_changed_first_choice_asks_for_the_second_search_again(raw):
    raw["search"]["when"] = "every"
    config, run, plan = planned(raw)
    found(search_of(raw), run, {"training.learning_rate": 5e-3})
    _, _, plan = planned(raw)
    second = search_of_step(config, 2, plan.steps[0].fingerprint, plan.base_fingerprint)
    found(second, run, {"training.learning_rate": 1e-3})
    found(search_of(raw), run, {"training.learning_rate": 6e-3})
    assert planned(raw)[2].undecided == 2


def test_search_by_command_alone_leaves_the_chain_as_it_is(raw):
    raw["search"]["when"] = None
    config = parse_config(raw)
    plan = make_plan(config, None, settings_found(RunDirectory(config.run_uri)))
    assert plan.undecided is None
    assert plan.steps == make_plan(config.model_copy(update={"search": None})).steps


@pytest.mark.parametrize("shortened", [False, True])
def test_the_winning_trial_is_taken_over_only_if_it_trained_this_very_step(raw, shortened):
    if shortened:
        raw["search"]["trial_training"] = {"max_train_examples": 5}
    target, (_, run, plan) = search_of(raw), planned(raw)
    values = {"training.learning_rate": 5e-3}
    spec = Spec(
        target.trial_config,
        f"{run.uri}/{target.folder}",
        1,
        target.tasks,
        target.parent,
        None,
        target.base,
        plan.base_directory,
        target.identities,
        target.names,
        target.cell_keys,
        1.0,
        trial_training=raw["search"].get("trial_training", {}),
    )
    step, trial = spec.step(values), spec.run(values)
    trial.write_bytes(f"{step.directory}/adapter/adapter_model.safetensors", b"weights")
    trial.write_bytes(f"{step.directory}/predictions/reviews.jsonl", b"{}")
    trial.write_json(f"{step.directory}/metrics.json", step_record(tasks=("reviews",), cells=(cell("reviews"),)))
    found(target, run, values, fingerprint=step.fingerprint, directory=step.directory)
    mine = planned(raw)[2].steps[0]
    assert adopt(run, target, mine) is not shortened
    assert (mine.fingerprint == step.fingerprint) is not shortened
    if not shortened:
        assert run.read_bytes(f"{mine.directory}/adapter/adapter_model.safetensors") == b"weights"
        assert run.list(f"{mine.directory}/predictions") == []  # test scores are still to be made
        assert run.metrics(mine.directory) is None
        assert run.trained(mine.directory).seconds.train == 2.0


# -- room


@pytest.mark.parametrize(
    ("workers", "cluster", "gpus", "limit", "expected"),
    [
        (2, {"CPU": 2}, 0, None, 1),
        (1, {"CPU": 2}, 0, None, 2),
        (1, {"CPU": 2}, 0, 1, 1),
        (3, {"CPU": 2}, 0, None, 1),  # check_cluster has refused it before
        (2, {"CPU": 64, "GPU": 8}, 1, None, 4),
        (1, {"CPU": 512}, 0, None, 4),  # no more than there are trials
    ],
)
def test_trials_fill_the_cluster_and_never_wait_for_each_other(raw, workers, cluster, gpus, limit, expected):
    raw["search"]["max_concurrent"] = limit
    config = parse_config(raw | {"resources": {"workers": workers, "gpus_per_worker": gpus}})
    assert concurrent(config, cluster, gpus) == expected
