"""A worker in this process trains a step that stops early: killed in between, it ends with the same bits."""

import pytest
from one_worker import opened, prepare, work_off

from pipelines.runs.directory import RunDirectory
from pipelines.workers.training_log import TrainingLog
from tests.conftest import WORDS, write_jsonl

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
STEPS, EVERY, PATIENCE = 40, 2, 3


class Killed(Exception):
    """Stands for SIGKILL: nothing of the step is tidied up."""


@pytest.fixture
def work(tmp_path, model, tokenizer, monkeypatch):
    """Trains a run and returns its directory; `kill_at`: the optimizer step after which the worker dies."""
    prepare(monkeypatch)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    text = tmp_path / "text"
    text.mkdir()
    for split, words in {"train": WORDS[:10], "validation": WORDS[10:], "test": WORDS}.items():
        # what is learned of some words is forgotten of the others, so the loss on them rises soon
        rows = [" ".join(words[(i + k) % len(words)] for k in range(9)) for i in range(12)]
        write_jsonl(text / f"{split}.jsonl", [{"text": row} for row in rows])

    def train(name: str, kill_at: int | None = None, **training) -> RunDirectory:
        raw = {
            "name": name,
            "base_model": {"path": str(tmp_path / "base"), "dtype": "float32"},
            "storage": str(tmp_path / "runs"),
            "adapter": {"type": "curlora", "r": 4},
            "strategy": {"name": "ilora", "share": 0.4, "consistency": 1.0, "decay": 0.5},
            "training": {"max_steps": STEPS, "batch_size": 4, "max_length": 24, "learning_rate": 0.1} | training,
            "resources": {"workers": 1, "gpus_per_worker": 0},
            "durability": {"checkpoint_seconds": 0},
            "tasks": [{"name": "text", "kind": "language-modeling", "data": str(text)}],
            "tracking": {"report_to": ["tensorboard"]},
        }
        config, run, plan = opened(raw)
        _kill(monkeypatch, kill_at)
        work_off(config, run, plan)
        return run

    return train


ADD = TrainingLog.add


def _kill(monkeypatch, step: int | None) -> None:
    def add(self, points) -> None:
        ADD(self, points)
        if step is not None and points[-1][0] >= step:
            raise Killed

    monkeypatch.setattr(TrainingLog, "add", add)


def kept(run: RunDirectory) -> tuple[dict, dict[str, bytes]]:
    """The record of the run's only step, and the bytes of what it has published."""
    (directory,) = [name for name in run.list("steps") if name.startswith("1-")]
    names = ("adapter/adapter_model.safetensors", "strategy/state.safetensors", "strategy/state.json")
    return run.read_json(f"steps/{directory}/metrics.json"), {
        name: run.read_bytes(f"steps/{directory}/{name}") for name in names
    }


def test_a_step_that_stops_early_ends_with_the_same_bits_if_it_is_killed(work):
    whole, files = kept(work("whole", validate_every=EVERY, patience=PATIENCE))
    validation = whole["training"]["validation"]
    assert validation["stopped_early"] and validation["rows"] > 0
    assert whole["training"]["steps"] == validation["best_step"] + PATIENCE * EVERY < STEPS
    losses = {step: loss for step, loss, _ in validation["curve"]}
    assert losses[validation["best_step"]] == min(losses.values()) == validation["best_loss"]
    assert whole["data"]["text"]["validation"]["rows"] == 12
    for kill_at in (1, validation["best_step"] + EVERY + 1):
        name = f"killed-{kill_at}"
        with pytest.raises(Killed):
            work(name, kill_at, validate_every=EVERY, patience=PATIENCE)
        again, same = kept(work(name, validate_every=EVERY, patience=PATIENCE))
        assert same == files
        found = again["training"]["validation"]
        assert [point[:2] for point in found["curve"]] == [point[:2] for point in validation["curve"]]
        assert [point[:2] for point in again["training"]["curve"]] == [p[:2] for p in whole["training"]["curve"]]
        assert again["cells"][0]["value"] == whole["cells"][0]["value"]


def test_without_validation_a_step_is_trained_to_its_end_and_says_nothing_of_it(work):
    run = work("plain", max_steps=6)
    record, _ = kept(run)
    assert record["training"]["steps"] == 6
    assert "validation" not in record["training"]
    assert "validation" not in record["data"]["text"]
    assert record["training"]["series"]["train/tokens_per_second"]
    assert not run.list("live")
    assert [name for name in run.list("tensorboard") if name.startswith("1-text-")]
