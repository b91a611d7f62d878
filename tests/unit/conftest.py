"""Fixtures that several unit tests share: the environment, a store of MLflow, and a run with a real adapter."""

import os

import pytest

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def environment():
    """The environment as it was, for the next file: a step that trains here tells Accelerate of DeepSpeed."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """One store for all tests of a file: the first migration of a sqlite file takes seconds."""
    from pipelines.lineage.store import initialize

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    initialize(uri)
    return uri


@pytest.fixture(scope="module")
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store)


@pytest.fixture
def trained(tmp_path, model, tokenizer, reviews):
    """A run with one finished step, and its model."""
    import torch
    import transformers

    from pipelines.config.loading import parse_config
    from pipelines.models import adapters
    from pipelines.runs.directory import RunDirectory
    from pipelines.runs.results import StepSummary
    from tests.conftest import minimal
    from tests.unit.sample_records import cell, results, step_record

    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "my-base")
    tokenizer.save_pretrained(tmp_path / "my-base")
    task = {"name": "reviews", "kind": "classification", "data": str(reviews), "head": "verbalizer"}
    task |= {"prompt": "{sentence}:"}
    base = {"path": str(tmp_path / "my-base"), "dtype": "float32"}
    config = parse_config(
        minimal(tmp_path, reviews, base_model=base, adapter={"type": "curlora", "r": 4}, tasks=[task])
    )
    run = RunDirectory(config.run_uri)
    run.open_for_writing(config)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "my-base", dtype=torch.float32)
    adapted = adapters.attach_adapter(loaded, config.adapter, 0)
    weights = {name: value for name, value in adapted.state_dict().items() if "curlora_" in name}
    for name, parameter in adapted.named_parameters():
        if "curlora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            weights[name] = parameter.detach().clone()
    (tmp_path / "step").mkdir()
    adapters.save_adapter(adapted, weights, tmp_path / "step", "my-base")
    directory = "steps/1-reviews-abcdef12"
    run.upload(tmp_path / "step", directory)
    record = step_record("abcdef1234", ("reviews",), parent="base", cells=(cell("reviews", value=0.75),))
    run.write_json(f"{directory}/metrics.json", record)
    run.write_json("results.json", results(steps=(StepSummary("reviews", "abcdef1234", directory),)))
    return run, adapted.eval()
