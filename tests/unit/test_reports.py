"""The curves of a step in TensorBoard and other tools of Transformers' Trainer."""

import importlib.util
import struct
from pathlib import Path

import pytest
import transformers

from pipelines.config.loading import parse_config
from pipelines.errors import ConfigError
from pipelines.preflight.tools import tool_problems
from pipelines.training import reports as module
from pipelines.training.reports import Reports
from tests.conftest import minimal


@pytest.fixture
def arguments(tmp_path):
    return transformers.TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value) of what TensorBoard would draw, from its files."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list] = {}
    for file in sorted(folder.glob("events.*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, round(value.simple_value, 4)))
    return found


def test_tensorboard_draws_the_curves_of_a_step(tmp_path, arguments, model):
    pytest.importorskip("tensorboardX")
    warned = []
    reports = Reports(["tensorboard"], arguments, model, str(tmp_path / "board"), {}, warned.append)
    for step in (1, 2):
        reports.log(step, {"loss": 1.0 / step, "learning_rate": 1e-3})
    reports.log(2, {"eval_loss": 0.75})
    reports.close()
    found = scalars(tmp_path / "board")
    assert found["train/loss"] == [(1, 1.0), (2, 0.5)]
    assert found["train/learning_rate"] == [(1, 0.001), (2, 0.001)]
    assert found["eval/loss"] == [(2, 0.75)]
    assert warned == []


def test_a_tool_that_fails_is_left_out_with_one_warning_and_the_other_goes_on(tmp_path, arguments, model, monkeypatch):
    class Full(transformers.TrainerCallback):
        def on_log(self, *_, **__):
            raise OSError("no space left on device")

    class Kept(transformers.TrainerCallback):
        steps: list = []  # noqa: RUF012

        def on_log(self, args, state, control, **_):
            self.steps.append(state.global_step)

    monkeypatch.setattr(module, "OPEN", {"full": lambda _: Full(), "kept": lambda _: Kept()})
    warned = []
    reports = Reports(["full", "kept"], arguments, model, str(tmp_path), {}, warned.append)
    for step in (1, 2, 3):
        reports.log(step, {"loss": 1.0})
    reports.close()
    assert warned == [
        "tracking.report_to: full failed (no space left on device); this step is not reported to it any more"
    ]
    assert Kept.steps == [1, 2, 3]


def test_a_missing_package_is_named_before_any_work(tmp_path, reviews, monkeypatch):
    config = parse_config(minimal(tmp_path, reviews, tracking={"report_to": ["tensorboard", "wandb"]}))
    there = {"tensorboardX"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    (problem,) = tool_problems(config)
    assert str(problem) == "tracking.report_to.1: wandb is not installed; pip install wandb, or remove it"
    there.add("wandb")
    assert list(tool_problems(config)) == []
    assert list(tool_problems(parse_config(minimal(tmp_path, reviews, tracking=None)))) == []


def test_another_tool_is_refused(tmp_path, reviews):
    with pytest.raises(ConfigError, match=r"tracking\.report_to"):
        parse_config(minimal(tmp_path, reviews, tracking={"report_to": ["mlflow"]}))
