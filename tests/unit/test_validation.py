"""Validation and early stopping: which rows decide, what is in a fingerprint, which state is kept and recorded."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from sample_run import make_run
from strategy_cases import adapted, rows
from test_lineage import history

from curlora.continual import make_strategy
from curlora.continual.parameters import adapter_parameters
from pipelines.chain.plan import make_plan, planned
from pipelines.chain.why import steps_ahead
from pipelines.config.loading import parse_config
from pipelines.config.sections import TrainingConfig
from pipelines.data.held_out import training_view, validation_part
from pipelines.data.sets import training_examples
from pipelines.data.sources import load_split
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, DivergedError
from pipelines.lineage import store as mlflow_store
from pipelines.lineage.projection import project
from pipelines.preflight.data import check_data
from pipelines.preflight.model import _check_deepspeed
from pipelines.reporting.page import write_report
from pipelines.runs.directory import RunDirectory
from pipelines.runs.step_record import Setting, Validated
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.validation import Validation
from tests.conftest import minimal, write_jsonl

ON = {"validate_every": 5, "patience": 2}
CPU = torch.device("cpu")


@pytest.fixture
def raw(tmp_path, reviews) -> dict:
    (tmp_path / "config.json").write_text("{}")
    return minimal(tmp_path, reviews, tracking=None, training=ON)


def add_validation(reviews, rows: int = 4) -> None:
    sentence = "the film is bad and dull indeed"
    write_jsonl(reviews / "validation.jsonl", [{"sentence": f"{sentence} {i}", "label": i % 2} for i in range(rows)])


# -- rows


def test_without_a_validation_split_a_tenth_of_train_validates_and_is_not_trained_on(raw):
    config, plan = planned(parse_config(raw), RunDirectory(raw["storage"]))
    assert plan.undecided is None
    (task,) = config.tasks
    trained, validated = (load_split(validation_part(task), split)["sentence"] for split in ("train", "validation"))
    whole = load_split(parse_config(raw).tasks[0], "train")["sentence"]
    assert sorted([*trained, *validated]) == sorted(whole)
    assert len(validated) == 3


def test_a_validation_split_is_used_and_all_of_train_is_trained_on(raw, reviews):
    add_validation(reviews)
    config, _ = planned(parse_config(raw), RunDirectory(raw["storage"]))
    (task,) = config.tasks
    assert len(load_split(task, "train")) == 24
    assert len(load_split(validation_part(task), "validation")) == 4


def test_a_search_and_validation_hold_the_same_rows_out_once(raw):
    config = training_view(parse_config(raw))
    assert training_view(config) == config


def test_classes_of_validation_rows_are_read_as_those_of_train(raw, reviews, tokenizer):
    (reviews / "labels.json").unlink()
    add_validation(reviews, rows=1)  # one class only
    task = parse_config(raw).tasks[0]
    (example,) = training_examples(task, tokenizer, 16, None, 0, "validation")
    assert example.target == 0
    assert len(training_examples(task, tokenizer, 16, None, 0)) == 24


# -- fingerprints


def step(raw) -> str:
    return planned(parse_config(raw), RunDirectory(raw["storage"]))[1].steps[0].fingerprint


def test_what_is_off_changes_no_fingerprint_and_what_is_on_does(raw):
    plain = make_plan(parse_config(raw | {"training": {}})).steps[0].fingerprint
    assert step(raw | {"training": dict.fromkeys(ON)}) == plain
    assert "patience" not in Setting.of(parse_config(raw | {"training": {}})).training
    found = {
        plain,
        step(raw),
        step(raw | {"training": {"validate_every": 5}}),
        step(raw | {"training": ON | {"patience": 3}}),
    }
    assert len(found) == 4


def test_another_validation_row_is_another_step_and_a_dry_run_says_so(tmp_path, raw, reviews):
    held = set(load_split(validation_part(training_view(parse_config(raw)).tasks[0]), "validation")["sentence"])
    before = step(raw)
    lines = [json.loads(line) for line in (reviews / "train.jsonl").read_text().splitlines()]
    number = next(n for n, line in enumerate(lines) if line["sentence"] in held)
    lines[number]["sentence"] += " indeed"
    write_jsonl(reviews / "train.jsonl", lines)
    assert step(raw) != before


def test_a_dry_run_names_changed_validation_data(tmp_path):
    options = {"tasks": ("mrpc",), "training": {"learning_rate": 3e-3, "epochs": 2, "validate_every": 5}}
    folder = tmp_path / "mrpc"
    folder.mkdir()
    write_jsonl(folder / "validation.jsonl", [{"text": "held", "label": 0}])
    run = make_run(tmp_path, **options)
    config = run.config()
    assert [s.state for s in steps_ahead(config, run, make_plan(config, run))] == ["done"]
    write_jsonl(folder / "validation.jsonl", [{"text": "held back", "label": 0}])
    (ahead,) = steps_ahead(config, run, make_plan(config, run))
    assert "the validation data of mrpc has changed (digest " in ahead.sentence


def test_patience_without_validation_is_refused(raw):
    with pytest.raises(ConfigError, match=r"training.*patience 2 counts validations.*validate_every: 50"):
        parse_config(raw | {"training": {"patience": 2}})


def test_several_workers_under_zero_3_are_refused_with_the_remedy(raw):
    config = raw | {"deepspeed": "zero3", "resources": {"workers": 2}}
    with pytest.raises(
        ConfigError, match=r"training\.validate_every: does not work under ZeRO-3.*use deepspeed: zero2"
    ):
        _check_deepspeed(parse_config(config))
    _check_deepspeed(parse_config(config | {"deepspeed": "zero2"}))
    _check_deepspeed(parse_config(config | {"resources": {"workers": 1}}))


def test_bad_validation_rows_are_found_at_the_door_where_they_are_read(raw, reviews):
    write_jsonl(reviews / "validation.jsonl", [{"sentence": "fine", "label": 0}, {"sentence": None, "label": 7}])
    assert check_data(parse_config(raw | {"training": {}})) == []
    found = "\n".join(map(str, check_data(parse_config(raw))))
    assert "validation.jsonl:2" in found
    assert "'sentence' is missing" in found


# -- the state that is kept


@pytest.fixture
def judged(model):
    """A model whose one adapter weight is set by the test, validated on a few rows; and that weight."""
    wrapped = adapted(model, "curlora")
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(name in adapter_parameters(wrapped))
    strategy = make_strategy("ilora", share=0.4, consistency=5.0, decay=0.5)
    return wrapped, strategy, next(iter(adapter_parameters(wrapped).values()))


def validation_of(model, strategy, resume=None, evaluated=nullcontext, patience=2) -> Validation:
    training = TrainingConfig(batch_size=4, validate_every=5, patience=patience)
    return Validation(rows("t", 7), training, World(0, 1, CPU), model, strategy, evaluated, {15: 99.0}, resume)


def scripted(monkeypatch, losses) -> None:
    """Let validations find these losses, one after another."""
    found = iter(losses)
    monkeypatch.setattr(Validation, "_loss", lambda self: next(found))


def test_the_lowest_loss_is_kept_and_patience_counts_from_it(judged, monkeypatch):
    model, strategy, weight = judged
    scripted(monkeypatch, [3.0, 2.0, 2.0, 2.5])
    validation = validation_of(model, strategy)
    over = []
    for number in range(1, 5):
        weight.data.fill_(number)
        validation.measure(5 * number)
        over.append(validation.is_over)
    assert over == [False, False, False, True]
    validation.keep_best()
    assert weight.unique().tolist() == [2.0]
    record = validation.record(40)
    assert (record.best_step, record.best_loss, record.rows, record.stopped_early) == (10, 2.0, 7, True)
    assert [point[:2] for point in record.curve] == [[5, 3.0], [10, 2.0], [15, 2.0], [20, 2.5]]
    assert record.curve[2][2] == 99.0  # told by a process that was interrupted


def test_without_patience_all_steps_are_trained_and_the_best_is_kept_nevertheless(judged, monkeypatch):
    model, strategy, weight = judged
    scripted(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    validation = validation_of(model, strategy, patience=None)
    for number in range(1, 5):
        weight.data.fill_(number)
        validation.measure(5 * number)
    assert not validation.is_over
    validation.keep_best()
    assert weight.unique().tolist() == [1.0]
    assert not validation.record(20).stopped_early


def test_a_checkpoint_holds_the_best_state_and_the_strategys_part_of_it(judged, monkeypatch):
    model, strategy, weight = judged
    scripted(monkeypatch, [2.0, 3.0, 4.0])
    validation = validation_of(model, strategy)
    weight.data.fill_(1.0)
    strategy.reservoir.add_task("first", rows("first", 3), 0)
    validation.measure(5)
    strategy.reservoir.add_task("second", rows("second", 3), 0)
    weight.data.fill_(2.0)
    validation.measure(10)
    tensors, values = validation.state()
    resumed = validation_of(model, strategy, Checkpoint(10, tensors, {"validation": json.loads(json.dumps(values))}))
    resumed.measure(15)
    assert resumed.is_over
    resumed.keep_best()
    assert weight.unique().tolist() == [1.0]
    assert strategy.reservoir.entered == ["first"]


def test_the_loss_is_the_mean_over_examples_and_nothing_is_disturbed(judged):
    model, strategy, _ = judged
    from pipelines.training.example_losses import losses_alone

    validation = validation_of(model, strategy)
    model.train()
    state = torch.get_rng_state()
    found = validation.measure(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    model.eval()
    singles = [losses_alone(model, [example], CPU).item() for example in validation.examples]
    assert found == pytest.approx(sum(singles) / 7, rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_step(judged, monkeypatch):
    scripted(monkeypatch, [float("nan")])
    with pytest.raises(DivergedError, match="validation loss is not finite after optimizer step 5"):
        validation_of(*judged[:2]).measure(5)


# -- records


@pytest.fixture
def validated_run(tmp_path):
    run = make_run(tmp_path, tasks=("mrpc", "sst2"))
    directory = run.results().steps[1].directory
    record = run.metrics(directory)
    curve = [[s, 1.0 + abs(s - 20) / 10, record.started + s] for s in (10, 20, 30)]
    training = replace(record.training, validation=Validated(curve, 20, 1.0, 3, True))
    run.write_json(f"{directory}/metrics.json", replace(record, training=training))
    return run


def test_mlflow_draws_the_validation_loss_by_optimizer_step(tmp_path, validated_run):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow_store.initialize(uri)
    ids, client = project(validated_run, uri, "validated"), MlflowClient(tracking_uri=uri)
    first, second = (ids[step.fingerprint] for step in validated_run.results().steps)
    assert history(client, second, "validation/loss") == [(10, 2.0), (20, 1.0), (30, 2.0)]
    assert client.get_run(second).data.metrics["validation/best_step"] == 20
    assert "validation/loss" not in client.get_run(first).data.metrics


def test_the_report_says_what_was_kept(validated_run):
    write_report(validated_run)
    page = validated_run.read_bytes("report.html").decode()
    assert "kept the state after step 20: lowest validation loss, 1.000, stopped early" in page
