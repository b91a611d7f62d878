"""Plans: what a step's identity is, which cells a row needs, and what is missing."""

import json
from dataclasses import replace

import pytest

from pipelines.chain.plan import make_plan
from pipelines.chain.results import build_results
from pipelines.config.loading import parse_config
from pipelines.errors import ConfigError
from pipelines.promotion.gate import judge
from pipelines.runs.directory import RunDirectory
from pipelines.workers.ray_cluster import check_cluster, gpus_per_worker, grown
from tests.conftest import minimal, write_jsonl
from tests.unit.sample_records import cell, results, step_record


@pytest.fixture
def raw(tmp_path, reviews):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "test"):
        write_jsonl(text / f"{split}.jsonl", [{"text": "some text"}])
    first = {"name": "first", "kind": "classification", "data": str(reviews), "text": "sentence"}
    verbalizer = {"name": "second", "head": "verbalizer", "prompt": "{sentence}:"}
    tasks = [first, first | verbalizer, {"name": "third", "kind": "language-modeling", "data": str(text)}]
    retention = [{"name": "wiki", "data": str(text)}]
    return minimal(
        tmp_path,
        reviews,
        tasks=tasks,
        retention=retention,
        base_model={"path": str(base), "dtype": "float32"},
        tracking=None,
    )


def fingerprints(raw) -> list[str]:
    return [step.fingerprint for step in make_plan(parse_config(raw)).steps]


def changed(raw, path: str, value) -> dict:
    copy = json.loads(json.dumps(raw))
    node = copy
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "other"),
        ("storage", "/elsewhere"),
        ("resources", {"workers": 1}),
        ("deepspeed", "zero3"),
        ("gate", {"max_forgetting": 0.5}),
        ("evaluation", {"max_examples": 5}),
        ("evaluation", {"samples": {"prompts": ["Who are you?"]}}),
        ("tasks.0.metric", "macro_f1"),
    ],
)
def test_what_is_not_part_of_a_steps_identity(raw, path, value):
    assert fingerprints(changed(raw, path, value)) == fingerprints(raw)


@pytest.mark.parametrize(
    ("path", "value", "first_changed"),
    [
        ("training.learning_rate", 1e-5, 0),
        ("adapter.r", 2, 0),
        ("tasks.0.labels", ["x", "y"], 0),
        ("tasks.1.prompt", "{sentence}?", 1),
        ("tasks.2.name", "renamed", 2),
    ],
)
def test_a_change_redoes_its_task_and_the_later_ones(raw, path, value, first_changed):
    before, after = fingerprints(raw), fingerprints(changed(raw, path, value))
    assert [a == b for a, b in zip(before, after, strict=True)] == [i < first_changed for i in range(3)]


def test_changed_training_data_redoes_its_task(raw, tmp_path):
    before = fingerprints(raw)
    write_jsonl(tmp_path / "text" / "train.jsonl", [{"text": "other text"}])
    after = fingerprints(raw)
    assert before[:2] == after[:2]
    assert before[2] != after[2]


def test_rows_hold_past_tasks_the_next_one_and_retention(raw):
    plan = make_plan(parse_config(raw))
    rows = [plan.needed[plan.base_directory], *(plan.needed[step.directory] for step in plan.steps)]
    assert rows == [
        ("second", "third", "wiki"),  # the first task's head is untrained
        ("first", "second", "wiki"),
        ("first", "second", "third", "wiki"),
        ("first", "second", "third", "wiki"),
    ]


def test_earlier_tasks_are_scored_as_often_as_asked_and_at_the_end(raw):
    plan = make_plan(parse_config(changed(raw, "evaluation.earlier_every", 2)))
    assert [plan.needed[step.directory] for step in plan.steps] == [
        ("first", "second", "wiki"),
        ("first", "second", "third", "wiki"),
        ("first", "second", "third", "wiki"),
    ]
    plan = make_plan(parse_config(changed(raw, "evaluation.earlier_every", 9)))
    assert plan.needed[plan.steps[1].directory] == ("second", "third", "wiki")
    assert plan.needed[plan.steps[2].directory] == ("first", "second", "third", "wiki")


def test_joint_is_one_step_on_all_tasks(raw):
    plan = make_plan(parse_config(changed(raw, "strategy", {"name": "joint"})))
    assert [step.tasks for step in plan.steps] == [("first", "second", "third")]
    assert plan.steps[0].label == "joint"


def test_a_missing_cell_is_found_without_redoing_its_step(raw):
    config = parse_config(raw)
    plan, run = make_plan(config), RunDirectory(config.run_uri)
    step = plan.steps[0]
    cells = [cell(n, key=plan.cell_keys[n]) for n in plan.needed[step.directory]]
    row = step_record(step.fingerprint, step.tasks, cells=tuple(cells[:-1]))
    run.write_json(f"{step.directory}/metrics.json", row)
    assert plan.missing_cells(run)[step.directory] == ["wiki"]
    assert [s.position for s in plan.missing_steps(run)] == [2, 3]


def finished(config, plan, run) -> None:
    """Write rows as workers do, with scores that a reader can check by eye."""
    scores = {0: {"second": 0.5, "third": 4.0}, 1: {"first": 0.8, "second": 0.6}}
    scores[2] = {"first": 0.7, "second": 0.9, "third": 3.9}
    scores[3] = {"first": 0.6, "second": 0.8, "third": 3.0}
    for position, directory in enumerate(plan.needed):
        values = scores[position] | {"wiki": 2.0 + 0.1 * position}
        cells = tuple(
            cell(n, "nll" if v > 1 else "accuracy", v, key=plan.cell_keys[n], majority=0.5) for n, v in values.items()
        )
        row = step_record(directory, ("task",) if position else (), cells=cells)
        run.write_json(f"{directory}/metrics.json", replace(row, head_parameters=position))


def test_results_follow_from_the_run_directory(raw):
    config = parse_config(raw)
    plan, run = make_plan(config), RunDirectory(config.run_uri)
    finished(config, plan, run)
    found = build_results(config, plan, run, "finished")
    assert found.scores == [[None, 0.5, 4.0], [0.8, 0.6, None], [0.7, 0.9, 3.9], [0.6, 0.8, 3.0]]
    assert found.nll["wiki"] == pytest.approx([2.0, 2.1, 2.2, 2.3])
    assert found.average_accuracy == pytest.approx(0.7)
    assert found.forgetting == pytest.approx(0.15)
    assert found.nll_learning == pytest.approx(1.0)
    assert found.seconds.to_json() == pytest.approx({"total": 14.0, "train": 8.0, "evaluate": 4.0, "overhead": 2.0})


def test_gate_refuses_with_reasons_and_ignores_what_does_not_exist(raw):
    config = parse_config(changed(raw, "gate", {"max_forgetting": 0.1, "max_perplexity_ratio": 2.0}))
    plan, run = make_plan(config), RunDirectory(config.run_uri)
    finished(config, plan, run)
    verdict = judge(build_results(config, plan, run, "finished"), config.gate)
    assert verdict == {"passed": False, "reasons": ["forgetting 0.1500 is above the limit 0.1"]}
    assert judge(results(), config.gate) == {"passed": True, "reasons": []}


def test_workers_that_can_never_be_placed_are_bad_input(raw):
    config = parse_config(changed(raw, "resources", {"workers": 3}))
    with pytest.raises(ConfigError, match=r"3 workers need 3 CPU, the cluster has 2; lower resources\.workers"):
        check_cluster(config, {"CPU": 2})
    gpus = parse_config(changed(raw, "resources", {"workers": 2, "gpus_per_worker": 1}))
    with pytest.raises(ConfigError, match="need 2 GPU, the cluster has 0"):
        check_cluster(gpus, {"CPU": 8})
    assert gpus_per_worker(config, {"GPU": 4}) == 1.0
    assert gpus_per_worker(config, {}) == 0.0


def test_a_cluster_that_grows_counts_with_what_it_may_grow_to(raw):
    """Its workers are gone between two jobs; a driver that starts then must wait for new ones, not refuse."""
    empty = {"CPU": 40.0, "memory": 1.0}
    config = parse_config(changed(raw, "resources", {"workers": 4, "gpus_per_worker": 1}))
    check_cluster(config, grown(empty, "CPU=32, GPU=4"))
    assert grown(empty, "CPU=32,GPU=4") == {"CPU": 40.0, "GPU": 4.0, "memory": 1.0}
    assert grown(empty, "") == empty
    for text in ("GPU", "GPU=x", "gpu=4", "GPU=4;CPU=1", "GPU=-1", "GPU=" + "9" * 400, "GPU=²"):
        with pytest.raises(ConfigError, match=r"CURLORA_CLUSTER_MAX: .* cannot be read"):
            grown(empty, text)
