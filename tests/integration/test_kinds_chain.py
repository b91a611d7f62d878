"""Every kind of task in one chain under ZeRO-3, and what `predict` makes of it afterwards in a single process."""

import json

import pytest

from tests.bench import answered_alone


@pytest.fixture(scope="module")
def chain(bench) -> dict:
    data = bench.raw["tasks"][0]["data"]
    names = json.loads((bench.root.joinpath(data) / "labels.json").read_text())
    tasks = [
        bench.raw["tasks"][0],
        {"name": "write", "kind": "generation", "data": data, "prompt": "{text}\nPart:", "completion": "{label}"},
        {"name": "choose", "kind": "multiple-choice", "data": data, "prompt": "{text}\nPart:", "choices": names},
        bench.raw["tasks"][2],
    ]
    tasks[1]["max_new_tokens"] = 4
    evaluation = {"max_examples": 30, "samples": {"prompts": ["This function returns"], "max_new_tokens": 6}}
    changes = {"tasks": tasks, "deepspeed": "zero3", "evaluation": evaluation}
    training = bench.raw["training"] | {"max_steps": 4}
    return bench.run_warm(bench.config("kinds", **changes, training=training))


def test_all_kinds_stand_in_one_matrix(chain):
    assert chain["status"] == "finished"
    assert list(chain["metric"].values()) == ["accuracy", "rouge_l", "accuracy", "nll"]
    first, *others = chain["scores"][0]
    assert first is None
    assert None not in others
    assert chain["forward_transfer"] is not None
    assert chain["nll_learning"] is not None


@pytest.mark.parametrize("name", ["part", "write", "choose", "text"])
def test_predict_in_one_process_agrees_with_the_sharded_evaluation(bench, chain, name):
    run = bench.root / "runs" / "kinds"
    last = run / chain["steps"][-1]["directory"] / "predictions" / f"{name}.jsonl"
    outcomes = [json.loads(line) for line in last.read_text().splitlines()]
    task = next(task for task in bench_tasks(run) if task["name"] == name)
    with open(f"{task['data']}/test.jsonl", encoding="utf-8") as file:
        rows = file.read().splitlines()
    (run / "in.jsonl").write_text("\n".join(rows[outcome["id"]] for outcome in outcomes) + "\n")
    out = bench.command("predict", str(run), "--task", name, "--json", "--file", str(run / "in.jsonl"))
    found = [json.loads(line) for line in out.splitlines()]
    if name == "text":
        assert [p["nll"] * p["tokens"] for p in found] == pytest.approx([o["nll"] for o in outcomes], rel=1e-4)
    else:
        assert [p["prediction"] for p in found] == [o["prediction"] for o in outcomes]


@pytest.mark.parametrize("step", ["base", "write", "text"])
def test_sharded_workers_say_what_one_process_says(bench, chain, step):
    row = ["base", "part", "write", "choose", "text"].index(step)
    found = bench.samples(chain)[row]
    assert {sample["task"] for sample in found} == {None, "write", "choose", "text"} | ({"part"} if row else set())
    assert found == answered_alone(bench.directory("kinds"), step)


def bench_tasks(run) -> list[dict]:
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())["tasks"]
