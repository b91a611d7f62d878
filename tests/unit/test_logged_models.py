"""Adapters as MLflow models: a signature that holds for every mixture of kinds, and what happens to one that fails."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest
from sample_run import make_run

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import TASKS
from pipelines.lineage.logged_models import example, signature
from pipelines.lineage.projection import Projection
from tests.conftest import minimal

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}]
KINDS = {
    "head": ({"kind": "classification", "text": ["sentence"]}, {"sentence": "a film"}),
    "pair": ({"kind": "classification", "text": ["sentence", "second"]}, {"sentence": "a film", "second": "a plot"}),
    "words": (
        {"kind": "classification", "head": "verbalizer", "prompt": "{body}:", "labels": ["bad", "good"]},
        {"body": "a film"},
    ),
    "chat": ({"kind": "generation", "messages": "messages"}, {"messages": CHAT}),
    "write": ({"kind": "generation", "prompt": "{sentence}", "completion": "{label}"}, {"sentence": "a film"}),
    "read": ({"kind": "language-modeling", "text": "text"}, {"text": "a text"}),
    "choose": (
        {"kind": "multiple-choice", "prompt": "{sentence}", "choices": "choices"},
        {"sentence": "a film", "choices": ["a", "b", "c"]},
    ),
    "clash": ({"kind": "language-modeling", "text": "messages"}, {"messages": "a text where others have chats"}),
}
MIXTURES = [*itertools.combinations(KINDS, 1), *itertools.combinations(KINDS, 2), tuple(KINDS)]
ECHO = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Echo(PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input

set_model(Echo())
"""


@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
def test_signature_takes_the_rows_of_every_task_whichever_was_learned_last(names, tmp_path):
    """MLflow itself judges: it validates the example on saving, and the rows before the model sees them."""
    import mlflow.pyfunc

    raw = minimal(tmp_path, tmp_path, tasks=[{"name": name, "data": "x"} | KINDS[name][0] for name in names])
    config = PipelineConfig.model_validate(raw)
    assert {task.kind for task in config.tasks} <= set(TASKS)
    (tmp_path / "echo.py").write_text(ECHO)
    for last in names:
        folder = tmp_path / f"model-{last}"
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(tmp_path / "echo.py"),
            signature=signature(config, last),
            input_example=example(config.task(last)),
            pip_requirements=[],
        )
    loaded = mlflow.pyfunc.load_model(str(folder))
    for name in names:
        row = KINDS[name][1]
        assert loaded.predict(pd.DataFrame([row])).to_dict("records") == [row]


def test_chain_of_a_classification_and_a_chat_is_complete_in_mlflow(store, client, tmp_path):
    run = make_run(tmp_path, tasks=("tickets", "chat"))
    projection = Projection(run, store, "mixed")
    ids = projection.send()
    assert projection.unlogged == {}
    assert {client.get_run(run_id).info.status for run_id in ids.values()} == {"FINISHED"}
    experiment = client.get_experiment_by_name("mixed").experiment_id
    assert [str(model.status) for model in client.search_logged_models([experiment])] == ["READY", "READY"]


def test_a_model_that_cannot_be_logged_stops_nothing_else_and_is_logged_later(store, client, tmp_path):
    run = make_run(tmp_path, tasks=("mrpc", "sst2", "biomed"))
    second = run.results().steps[1]
    file = f"{second.directory}/adapter/adapter_model.safetensors"
    content = run.read_bytes(file)
    run.remove(file)
    projection = Projection(run, store, "damaged")
    ids = projection.send()
    assert set(projection.unlogged) == {second.fingerprint}
    assert "the model of step 2 (sst2) could not be logged" in projection.unlogged[second.fingerprint]
    runs = {name: client.get_run(run_id) for name, run_id in ids.items()}
    assert {found.info.status for found in runs.values()} == {"FINISHED"}
    assert runs[second.fingerprint].data.metrics["score/sst2"]
    assert "could not be logged" in runs[second.fingerprint].data.tags["curlora.model_error"]
    assert len(runs["parent"].outputs.model_outputs) == 2
    assert projection.send() == ids and len(projection.unlogged) == 1  # not tried again while the chain goes on

    run.write_bytes(file, content)
    later = Projection(run, store, "damaged")
    assert later.send() == ids and later.unlogged == {}
    repaired = client.get_run(ids[second.fingerprint])
    assert "curlora.model_error" not in repaired.data.tags
    model = client.get_logged_model(repaired.outputs.model_outputs[0].model_id)
    assert str(model.status) == "READY"
    assert len(client.get_run(ids["parent"]).outputs.model_outputs) == 3
    history = client.get_metric_history(repaired.info.run_id, "score/sst2")
    assert len(history) == 1
