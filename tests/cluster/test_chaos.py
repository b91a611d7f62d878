"""Kill anything, lose nothing: a chain that is broken again and again ends like the undisturbed one, bit for bit."""

import json
import random
import socket
import subprocess

import pytest

from pipelines.lineage.model_card import CARD
from tests.cluster.chaos import DAMAGES, Chaos, Server

STEPS = 200
STRATEGIES = ("ilora", "replay")  # the short form has the first: it replays too, and keeps two copies of the adapter
SHORT = ["worker", "mlflow", "disk", "driver", "sigterm", "raylet"]


@pytest.fixture
def server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(f"sqlite:///{tmp_path}/mlflow.db", port)
    server.start()
    yield server
    if server.process.poll() is None:
        server.kill()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, to be filled up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def damages(request, rng: random.Random) -> list[str]:
    count = request.config.getoption("--chaos")
    return [rng.choice(DAMAGES) for _ in range(count)] if count else SHORT


def pytest_generate_tests(metafunc):
    metafunc.parametrize("strategy", STRATEGIES if metafunc.config.getoption("--chaos") else STRATEGIES[:1])


def test_broken_chain_ends_like_the_undisturbed_one(bench, server, small_disk, request, strategy):
    rng = random.Random(f"{request.config.getoption('--chaos-seed')}-{strategy}")
    wanted_damages = damages(request, rng)
    changes = {
        "strategy": {"name": strategy},
        "training": bench.raw["training"] | {"max_steps": STEPS + 20 * max(0, len(wanted_damages) - 3)},
        "durability": {"checkpoint_seconds": 0.5, "hang_timeout": 12},
    }
    calm = bench.run_warm(bench.config(f"calm-{strategy}", **changes))
    tracking = {"uri": server.address, "experiment": "chaos"}
    name = f"chaos-{strategy}"
    config = bench.config(name, **changes, storage=str(small_disk), tracking=tracking)
    chaos = Chaos(bench, config, name, server, small_disk, rng)
    try:
        results = chaos.run(wanted_damages)
    finally:
        print(f"{strategy}: " + "; ".join(f"{damage} after {s} s while {phase}" for damage, s, phase in chaos.log))
    assert len(chaos.log) == len(wanted_damages)
    assert results["status"] == "finished"
    assert results["scores"] == calm["scores"]
    assert results["nll"] == calm["nll"]
    for step, wanted in zip(results["steps"], calm["steps"], strict=True):
        there, here = small_disk / name / step["directory"], bench.directory(calm["run"]) / wanted["directory"]
        assert files_of(there) == files_of(here)
    chaos._mend()
    bench.command("run", str(config))  # sends to MLflow what could not be sent before
    assert_nothing_is_twice(server, results, len(calm["steps"]))


def files_of(step) -> dict[str, bytes]:
    """Adapter, heads, strategy state and predictions; metrics.json holds times, the model card the run's name."""
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.name not in ("metrics.json", CARD))
    curve = [loss for _, loss, _, _ in json.loads((step / "metrics.json").read_text())["training"]["curve"]]
    return {path.relative_to(step).as_posix(): path.read_bytes() for path in files} | {"curve": repr(curve).encode()}


def assert_nothing_is_twice(server, results: dict, steps: int) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(server.address)
    experiment = client.get_experiment_by_name("chaos")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert (len(parents), len(runs)) == (1, 1 + steps)
    for run in runs:
        for key in run.data.metrics:
            history = [(m.step, m.timestamp) for m in client.get_metric_history(run.info.run_id, key)]
            assert len(history) == len(set(history)), key
