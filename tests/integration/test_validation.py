"""A task that stops early keeps the same bits whether its workers were killed in between or not."""

import json

import pytest

from tests.bench import wait_for
from tests.cluster.chaos import named

EVERY, PATIENCE = 3, 12


@pytest.fixture(scope="module")
def changes(bench) -> dict:
    """A text of which the loss on held-out rows soon rises; the second task stands for what comes after it."""
    training = bench.raw["training"] | {"learning_rate": 5e-2, "max_steps": 200, "validate_every": EVERY}
    return {
        "tasks": [bench.raw["tasks"][2], bench.raw["tasks"][1]],
        "strategy": {"name": "replay", "size": 8},
        "training": training | {"patience": PATIENCE, "max_train_examples": 48},
        "durability": {"checkpoint_seconds": 0.5},
        "evaluation": {},
    }


@pytest.fixture(scope="module")
def calm(bench, changes) -> dict:
    return bench.run_warm(bench.config("validated-calm", **changes))


def test_a_killed_worker_changes_no_bit_of_what_is_kept(bench, changes, calm):
    process = bench.start(bench.config("validated-killed", **changes))
    progress = bench.directory("validated-killed") / "progress.json"

    def after_a_checkpoint_with_a_best_state() -> bool:
        now = json.loads(progress.read_text()) if progress.exists() else {}
        saved = list((bench.directory("validated-killed") / "train").glob("*/*.json"))
        return now.get("kind") in ("training", "validating") and now["step"] > 2 * EVERY and bool(saved)

    wait_for(after_a_checkpoint_with_a_best_state, process)
    named(process, "RayTrainWorker")[0].kill()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    killed = json.loads(out)
    first, again = bench.metrics(calm, 0)["training"], bench.metrics(killed, 0)["training"]
    assert again["resumed_at"] and not first["resumed_at"]
    validation = first["validation"]
    assert validation["stopped_early"] and first["steps"] == validation["best_step"] + PATIENCE * EVERY < 200
    assert [point[:2] for point in validation["curve"]] == [point[:2] for point in again["validation"]["curve"]]
    for step in (0, 1):
        assert bench.adapter_bytes(killed, step) == bench.adapter_bytes(calm, step)
    state = [bench.step(results, 0) / "strategy" / "state.safetensors" for results in (calm, killed)]
    assert state[0].read_bytes() == state[1].read_bytes()
    assert killed["scores"] == calm["scores"]
