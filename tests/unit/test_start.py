"""`start_from`: which step it means, what fits it, and the steps that follow from it."""

import shutil

import pytest
from sample_run import make_config, make_run

from pipelines.chain.base_dtype import with_dtype
from pipelines.chain.driver import run_chain
from pipelines.chain.plan import make_plan
from pipelines.chain.results import build_results
from pipelines.chain.start import find_start
from pipelines.config.loading import parse_config
from pipelines.data.sources import digest_of
from pipelines.errors import ConfigError, RunDirectoryError
from pipelines.promotion.publish import sync
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import lineage
from pipelines.runs.start import record_start
from pipelines.runs.step_record import Setting, Split, TaskData
from tests.conftest import minimal, write_jsonl
from tests.unit.sample_records import step_record

TASKS = ("first", "second", "third")


@pytest.fixture
def raw(tmp_path, reviews):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    tasks = [{"name": "first", "kind": "classification", "data": str(reviews), "text": "sentence"}]
    for name in TASKS[1:]:
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", [{"text": f"the text of {name}"}])
        tasks.append({"name": name, "kind": "language-modeling", "data": str(tmp_path / name)})
    return minimal(tmp_path, reviews, tasks=tasks, base_model={"path": str(base), "dtype": "float32"}, tracking=None)


def finish(raw) -> RunDirectory:
    """A run as its workers leave it, without what they learn."""
    config = parse_config(raw)
    run = RunDirectory(config.run_uri)
    plan = make_plan(config, run)
    run.open_for_writing(config)
    record_start(run, plan.start)
    for step in plan.steps:
        row = step_record(
            step.fingerprint,
            step.tasks,
            position=step.position,
            depth=step.depth,
            parent=step.parent,
            parent_run=plan.start.run_uri if plan.start and step.position == 1 else None,
            setting=Setting.of(config),
            data={name: TaskData(Split(digest_of(config.task(name), "train"), 1)) for name in step.tasks},
        )
        run.write_json(f"{step.directory}/metrics.json", row)
    run.write_json("results.json", build_results(config, plan, run, "finished"))
    return run


def after(raw, run: RunDirectory, step: str, **changes) -> dict:
    return raw | {"name": "next", "start_from": f"{run.uri}/{step}"} | changes


def problem(raw) -> str:
    with pytest.raises(ConfigError) as error:
        make_plan(parse_config(raw))
    assert len(error.value.problems) == 1
    return str(error.value)


@pytest.fixture
def earlier(raw):
    """A finished run of the first two tasks."""
    return finish(raw | {"tasks": raw["tasks"][:2]})


def test_a_chain_in_two_runs_has_the_steps_of_the_chain_in_one(raw, earlier):
    whole = make_plan(parse_config(raw | {"name": "whole"})).steps
    rest = make_plan(parse_config(after(raw, earlier, "second"))).steps
    assert [step.fingerprint for step in rest] == [whole[2].fingerprint]
    assert rest[0].parent == whole[1].fingerprint
    assert (rest[0].position, rest[0].depth) == (1, 3)  # seeds count by depth


def test_tasks_of_the_earlier_run_are_scored_from_the_start_and_not_trained(raw, earlier):
    config = parse_config(after(raw, earlier, "second"))
    plan = make_plan(config)
    assert plan.needed[plan.base_directory] == TASKS  # the trained head has a score
    assert plan.needed[plan.steps[0].directory] == TASKS
    assert plan.learned_at() == {"first": 0, "second": 0, "third": 1}
    results = build_results(config, plan, RunDirectory(config.run_uri), "running")
    assert results.start_from == {"run": earlier.uri, "step": plan.start.directory}


def test_a_task_whose_training_data_changed_is_trained_again(raw, earlier, tmp_path):
    write_jsonl(tmp_path / "second" / "train.jsonl", [{"text": "new text"}])
    plan = make_plan(parse_config(after(raw, earlier, "second")))
    assert [step.tasks for step in plan.steps] == [("second",), ("third",)]
    assert plan.earlier == ("first",)


def test_steps_are_named_by_task_position_fingerprint_or_directory(raw, earlier):
    step = earlier.results().steps[0]
    names = ["first", "1", step.fingerprint, step.directory, step.directory.split("/")[-1]]
    found = {find_start(parse_config(after(raw, earlier, name))).fingerprint for name in names}
    assert found == {step.fingerprint}


def test_lineage_leads_through_several_runs(raw, earlier, tmp_path):
    second = finish(after(raw, earlier, "second", name="next", tasks=raw["tasks"][2:]))
    extra = {"name": "fourth", "kind": "language-modeling", "data": str(tmp_path / "second")}
    start = find_start(parse_config(after(raw, second, "third", name="last", tasks=[extra])))
    assert list(start.digests) == list(TASKS)
    assert start.depth == 3
    assert [row.tasks for row in lineage(start.run, start.directory)] == [("third",), ("second",), ("first",)]
    shutil.rmtree(earlier.uri)  # what the second run started from is on its own record
    assert find_start(parse_config(after(raw, second, "third", name="last", tasks=[extra]))) == start


def test_a_run_that_goes_on_keeps_the_parent_it_began_with(tmp_path):
    """An alias moves in the registry, for example to what this very run has made."""
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "start"}
    registered = {"tracking": tracking | {"register_as": "desk"}, "gate": {"max_forgetting": 0.5}}
    first = make_run(tmp_path, name="first", tasks=("mrpc", "sst2"), **registered)
    sync(first)
    config = make_config(
        tmp_path, name="next", tasks=("biomed",), start_from="models:/desk@champion", tracking=tracking
    )
    run = RunDirectory(config.run_uri)
    plan = make_plan(config, run)
    assert plan.start.fingerprint == first.results().steps[-1].fingerprint
    record_start(run, plan.start)
    second = make_run(tmp_path, name="second", tasks=("mrpc", "sst2"), drop=-0.02, **registered)
    sync(second)
    assert make_plan(config, run) == plan
    assert make_plan(config).start.fingerprint == second.results().steps[-1].fingerprint


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter": {"r": 4}}, "adapter.r: is 4, but the adapter of"),
        ({"adapter": {"type": "lora"}}, "set adapter.type: curlora"),
        ({"adapter": {"carry": "bank"}}, "set adapter.carry: continue"),
        ({"start_from": "models:/m"}, "has no alias; write models:/<name>@champion"),
        ({"start_from": "models:/m@champion"}, "needs a model registry; set tracking.uri"),
        ({"start_from": "/nowhere/first"}, "/nowhere is not a run with results"),
    ],
)
def test_what_does_not_fit_names_field_value_and_remedy(raw, earlier, changes, expected):
    assert expected in problem(after(raw, earlier, "second", **changes))


def test_another_base_is_refused(raw, earlier, tmp_path):
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"others")
    found = problem(after(raw, earlier, "second", base_model={"path": str(tmp_path / "other"), "dtype": "float32"}))
    assert f"set base_model.path: {tmp_path / 'base'}" in found


def test_state_of_another_strategy_is_refused(raw, earlier):
    directory = earlier.results().steps[1].directory
    earlier.write_json(f"{directory}/strategy/state.json", {})
    assert "set strategy.name: sequential" in problem(after(raw, earlier, "second", strategy={"name": "ewc"}))


def test_unknown_steps_and_nothing_to_train_are_bad_input(raw, earlier):
    assert "has no finished step 'ghost'; finished: first, second" in problem(after(raw, earlier, "ghost"))
    assert "learned all of them already" in problem(after(raw, earlier, "second", tasks=raw["tasks"][:2]))


def test_what_was_trained_before_is_judged_by_what_is_left_of_it(raw, earlier):
    from pipelines.metrics.score_matrix import aggregates

    found = aggregates([[0.9, 0.3], [0.7, 0.8]], ["accuracy"] * 2, {}, rows=[0, 1])
    assert found["learning_accuracy"] == 0.8
    assert found["backward_transfer"] == pytest.approx(-0.2)
    assert found["forgetting"] == pytest.approx(0.2)


def test_a_start_that_is_gone_is_told_before_any_worker_starts(tmp_path):
    first = make_run(tmp_path, name="first", tasks=("mrpc", "sst2"))
    step = first.results().steps[-1]
    start_from = f"{first.uri}/{step.fingerprint}"
    config = make_config(tmp_path, name="next", tasks=("biomed",), retention=(), start_from=start_from)
    run = RunDirectory(config.run_uri)
    record_start(run, make_plan(config, run).start)  # an interrupted run knows what it began with
    first.remove(f"{step.directory}/metrics.json")
    with pytest.raises(RunDirectoryError, match=r"start_from: .*metrics\.json is missing"):
        run_chain(config, group=object())


def test_auto_takes_the_dtype_of_the_step_that_a_chain_starts_from(raw):
    earlier = finish(raw | {"name": "earlier"})
    config = parse_config(after(raw, earlier, "second", base_model={"path": raw["base_model"]["path"]}))
    assert config.base_model.dtype == "auto"
    assert with_dtype(config).base_model.dtype == "float32"
