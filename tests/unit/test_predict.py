"""`predict` on a run as workers write it: the same answers as the evaluation, for every kind."""

import json
import shutil
import zipfile
from dataclasses import replace

import pytest
from click.testing import CliRunner

from pipelines.cli.app import main
from pipelines.config.loading import parse_config
from pipelines.data.kinds import kind_of
from pipelines.data.sets import evaluation_set
from pipelines.data.sources import load_split, records
from pipelines.distributed.world import World
from pipelines.errors import ConfigError
from pipelines.evaluation.evaluate import evaluate
from pipelines.inference.predict import input_columns, load_trained, predict, rows_of_file, rows_of_texts
from pipelines.models import adapters, heads
from pipelines.runs.directory import RunDirectory
from pipelines.runs.results import StepSummary
from pipelines.runs.step_record import PublishedFile
from tests.conftest import WORDS, write_jsonl
from tests.unit.sample_records import results, step_record

ROWS = [
    {
        "text": f"the film is {word} and {WORDS[(i * 7) % 20]}",
        "second": "a plot",
        "label": i % 2,
        "choices": [word, "and of with", "dull"],
    }
    for i, word in enumerate(WORDS)
]
TASKS = [
    {"name": "head", "kind": "classification", "text": ["text", "second"]},
    {"name": "words", "kind": "classification", "head": "verbalizer", "prompt": "{text}:", "labels": ["bad", "good"]},
    {"name": "write", "kind": "generation", "prompt": "{text}", "completion": "{second}", "max_new_tokens": 5},
    {"name": "choose", "kind": "multiple-choice", "prompt": "{text}", "choices": "choices"},
    {"name": "read", "kind": "language-modeling"},
    {"name": "later", "kind": "classification", "text": "text"},
]


@pytest.fixture
def trained(tmp_path, model, tokenizer):
    """A run with one finished step whose adapter and head say something; and its model."""
    import torch

    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        write_jsonl(data / f"{split}.jsonl", ROWS)
    raw = {
        "name": "run",
        "base_model": {"path": str(tmp_path / "base"), "dtype": "float32"},
        "storage": str(tmp_path / "runs"),
    }
    raw |= {"adapter": {"type": "curlora", "r": 4}, "training": {"max_length": 40}}
    raw["tasks"] = [task | {"data": str(data)} for task in TASKS]
    config = parse_config(raw)
    run = RunDirectory(config.run_uri)
    run.open_for_writing(config)
    adapted = adapters.attach_adapter(model, config.adapter, 0)
    heads.attach_heads(adapted, {"head": 2, "later": 2}, 0)
    generator = torch.Generator().manual_seed(1)
    chosen = {}
    for name, parameter in adapted.named_parameters():
        if "curlora_" in name or heads.saved_name(name):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            chosen[name] = parameter.detach().clone()
    buffers = {name: b for name, b in adapted.state_dict().items() if "curlora_" in name}
    folder = tmp_path / "step"
    folder.mkdir()
    adapters.save_adapter(adapted, buffers | chosen, folder)
    run.upload(folder, "steps/1-head-abcdef12")
    run.write_json("steps/1-head-abcdef12/metrics.json", step_record("abcdef1234", ("head",), parent="base"))
    run.write_json("steps/0-base-base/metrics.json", step_record("base"))
    step = StepSummary("head", "abcdef1234", "steps/1-head-abcdef12")
    run.write_json("results.json", results(steps=(step,)))
    return run, adapted


@pytest.mark.parametrize("name", ["head", "words", "write", "choose", "read"])
def test_predictions_agree_with_the_evaluation_of_the_same_rows(trained, tokenizer, name):
    run, adapted = trained
    config = run.config()
    evaluation = evaluation_set(config.task(name), tokenizer, config, 64)
    import torch

    _, outcomes = evaluate(adapted, evaluation, World(0, 1, torch.device("cpu")), 300, "task", "k")
    wanted = kind_of(config.task(name)).inputs(config.task(name))
    rows = list(records(load_split(config.task(name), "test"), wanted))  # without labels: nothing to cheat with
    found = predict(run, name, rows)
    if name == "read":
        assert [p["nll"] * p["tokens"] for p in found] == pytest.approx([o["nll"] for o in outcomes], rel=1e-5)
    else:
        assert [p["prediction"] for p in found] == [o["prediction"] for o in outcomes]
    if name in ("head", "write"):
        assert len({p["prediction"] for p in found}) > 1  # so the agreement says something


def test_the_base_is_a_step_too(trained):
    run, _ = trained
    row = [{"text": "the film is good"}]
    assert predict(run, "read", row, "base")[0]["nll"] != pytest.approx(predict(run, "read", row)[0]["nll"], rel=1e-4)
    assert not hasattr(load_trained(run, "base").model, "peft_config")


@pytest.mark.parametrize(
    ("task", "rows", "step", "expected"),
    [
        ("haed", [{}], None, "did you mean 'head'?"),
        ("head", [{"text": "a"}], None, "row 1: has no 'second'"),
        ("read", [{"text": "a"}, {"text": 3}], None, "row 2: 'text' is a int (3), expected text"),
        ("read", [], None, "nothing to predict"),
        ("head", [{"text": "a", "second": "b"}], "ghost", "no finished step 'ghost'"),
        ("head", [{"text": "a", "second": "b"}], "base", "its head is untrained at this step"),
        ("later", [{"text": "a"}], None, "its head is untrained"),
    ],
)
def test_what_cannot_be_predicted_is_explained(trained, task, rows, step, expected):
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?").replace("(", r"\(").replace(")", r"\)")):
        predict(trained[0], task, rows, step)


def test_texts_become_rows_by_the_tasks_fields(trained):
    run, _ = trained
    assert rows_of_texts(run, "head", ["a", "b", "c", "d"]) == [
        {"text": "a", "second": "b"},
        {"text": "c", "second": "d"},
    ]
    with pytest.raises(ConfigError, match="must be given 2 times per row: text, second"):
        rows_of_texts(run, "head", ["a"])
    with pytest.raises(ConfigError, match="by --file"):
        rows_of_texts(run, "choose", ["a"])


def test_command_line(trained, tmp_path):
    run, _ = trained

    def call(*arguments: str):
        return CliRunner().invoke(main, ["predict", run.uri, *arguments])

    plain = call("--task", "words", "--text", "the film", "--text", "a plot")
    assert plain.exit_code == 0, plain.output
    assert set(plain.stdout.split()) <= {"bad", "good"}
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    found = [
        json.loads(line)
        for line in call("--task", "choose", "--file", str(tmp_path / "in.jsonl"), "--json").stdout.splitlines()
    ]
    assert [p["label"] for p in found] == [row["choices"][p["prediction"]] for p, row in zip(found, ROWS, strict=True)]
    assert "perplexity" in call("--task", "read", "--text", "the film is good").stdout
    assert call("--task", "read").exit_code == 2
    (tmp_path / "in.jsonl").write_text('{"text": "a"\n[1]\n')
    broken = call("--task", "read", "--file", str(tmp_path / "in.jsonl"))
    assert broken.exit_code == 2
    assert "in.jsonl:1: not valid JSON" in broken.output
    assert "in.jsonl:2: expected an object" in broken.output
    with pytest.raises(ConfigError, match="cannot be read"):
        rows_of_file(tmp_path / "nowhere.jsonl")


@pytest.fixture
def served(trained, tmp_path):
    """The same step as an MLflow model, loaded."""
    import mlflow.pyfunc

    from pipelines.data.kinds import kind_of
    from pipelines.lineage.logged_models import Adapter, learned_tasks, write_model
    from pipelines.runs.identity import base_fingerprint

    run, _ = trained
    directory, config = "steps/1-head-abcdef12", run.config()
    paths = (path.removeprefix(run.path(directory) + "/") for path in run.fs.find(run.path(directory)))
    learned = [task for task in config.tasks if task.name != "later"]
    classes = {task.name: kind_of(task).classes(task) for task in learned}
    metrics = replace(run.metrics(directory), files={path: PublishedFile(0) for path in paths}, classes=classes)
    tasks = learned_tasks([(config, replace(metrics, tasks=tuple(task.name for task in learned)))])
    config = config.model_copy(update={"tasks": tasks})
    write_model(Adapter(run, directory, metrics, config, base_fingerprint(config.base_model)), tmp_path / "model")
    return mlflow.pyfunc.load_model(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["head", "words", "write", "choose", "read"])
def test_the_mlflow_model_says_what_predict_says_without_the_data(trained, served, name, tmp_path):
    import pandas as pd

    run, _ = trained
    rows = [{column: row[column] for column in input_columns(run, name)} for row in ROWS[:6]]
    wanted = predict(run, name, rows)
    shutil.rmtree(tmp_path / "data")
    answered = served.predict(pd.DataFrame(rows), params={"task": name}).to_dict("records")
    assert answered == wanted


def test_the_mlflow_model_is_code_without_pickles_and_asks_for_its_packages(served, tmp_path):
    folder = tmp_path / "model"
    files = [path.name for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]
    assert {"pyfunc_entry.py", "input_example.json"} <= set(files)
    requirements = (folder / "requirements.txt").read_text()
    assert "torch==" in requirements and "+" not in requirements
    assert "curlora" not in requirements  # no index has it; the model brings it
    (wheel,) = (folder / "code").iterdir()
    assert {"pipelines/inference/pyfunc.py", "curlora/layer.py"} <= set(zipfile.ZipFile(wheel).namelist())
    assert [column.name for column in served.metadata.get_input_schema().inputs] == ["text", "second", "choices"]
    facts = served.metadata.metadata["curlora"]
    assert facts["tasks"] == ["head", "words", "write", "choose", "read"]


def test_the_mlflow_model_refuses_another_base(served, tmp_path):
    import mlflow.pyfunc

    other = tmp_path / "other"
    shutil.copytree(tmp_path / "base", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(ConfigError, match="the adapter was trained on"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"base_model": str(other)})
    with pytest.raises(ConfigError, match="set its path"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"base_model": str(tmp_path / "none")})
