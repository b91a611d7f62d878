"""An interrupted step goes on in its middle: same bits on the same workers, no jump on others."""

import json
import os
import shutil
import signal

import psutil
import pytest

from tests.bench import all_gone, wait_for

STEPS = 240  # many more than the workers make until they hear of the signal
AFTER = 6  # optimizer steps of the first task before it is stopped


@pytest.fixture(scope="module")
def changes(bench) -> dict:
    """One task; r = 3, so that 9 numbers a layer do not divide by two ranks."""
    return {
        "adapter": {"type": "curlora", "r": 3},
        "tasks": bench.raw["tasks"][:1],
        "training": bench.raw["training"] | {"max_steps": STEPS},
        "durability": {"checkpoint_seconds": 0},
    }


@pytest.fixture(scope="module")
def calm(bench, changes) -> dict:
    return bench.run_warm(bench.config("calm", **changes))


@pytest.fixture(scope="module")
def stopped(bench, changes):
    """The directory of a run that SIGTERM ended in the middle of its task."""
    process = bench.start(bench.config("stopped", **changes))
    progress = bench.directory("stopped") / "progress.json"

    def far_enough() -> bool:
        now = json.loads(progress.read_text()) if progress.exists() else {}
        return now.get("kind") == "training" and now["step"] >= AFTER

    wait_for(far_enough, process)
    started = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "run the same command to continue" in err
    wait_for(lambda: all_gone(started), seconds=10)  # no stray processes
    assert json.loads((bench.directory("stopped") / "results.json").read_text())["status"] == "stopped"
    assert not (bench.directory("stopped") / "stop.json").exists()
    return bench.directory("stopped")


def curve(bench, results: dict) -> list[float]:
    return [loss for _, loss, _, _ in bench.metrics(results, 0)["training"]["curve"]]


def test_the_same_workers_end_with_the_same_bits_even_from_a_checkpoint_before_a_truncated_one(
    bench, changes, calm, stopped
):
    newest = sorted((stopped / "train").glob("*/*.safetensors"))[-1]
    shutil.copytree(stopped, bench.directory("damaged"))
    copy = bench.directory("damaged") / newest.relative_to(stopped)
    copy.write_bytes(copy.read_bytes()[:-7])
    results = bench.run(bench.config("damaged", **changes))
    training = bench.metrics(results, 0)["training"]
    assert 0 < training["resumed_at"][0] < int(newest.stem)
    assert training["tokens"] == bench.metrics(calm, 0)["training"]["tokens"]
    assert bench.adapter_bytes(results, 0) == bench.adapter_bytes(calm, 0)
    assert curve(bench, results) == curve(bench, calm)
    assert results["scores"] == calm["scores"]
    assert bench.samples(results)[1] == bench.samples(calm)[1]


@pytest.mark.parametrize(
    ("name", "more"), [("one-worker", {"resources": {"workers": 1}}), ("zero-3", {"deepspeed": "zero3"})]
)
def test_losses_go_on_without_a_jump_on_other_workers_and_stages(bench, changes, calm, stopped, name, more):
    shutil.copytree(stopped, bench.directory(name))
    results = bench.run_warm(bench.config(name, **changes, **more))
    assert bench.metrics(results, 0)["training"]["resumed_at"][0] >= AFTER
    assert curve(bench, results) == pytest.approx(curve(bench, calm), rel=1e-4)


def test_a_finished_step_without_its_adapter_is_found_and_redone_on_request(bench, changes, calm):
    shutil.copytree(bench.directory("calm"), bench.directory("lost"))
    config = bench.config("lost", **changes)
    adapter = bench.directory("lost") / calm["steps"][0]["directory"] / "adapter" / "adapter_model.safetensors"
    wanted = adapter.read_bytes()
    adapter.unlink()
    err = bench.command("run", str(config), code=2)
    assert "adapter_model.safetensors: is missing" in err
    assert "--redo part" in err
    results = bench.run_warm(config, redo=["part"])
    assert adapter.read_bytes() == wanted
    assert results["scores"] == calm["scores"]
