"""A Ray cluster of two nodes on this machine loses the one with a worker; the chain goes on when another one comes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import wait_for


@pytest.fixture(scope="module")
def cluster():
    """A head and a second node, one CPU each: two workers need both. Nodes are found dead after about 5 s."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # a cluster of these tests alone, on loopback
        settings = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": settings})
        cluster.second = cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


def lose_the_second_node(cluster) -> None:
    """And get another one."""
    cluster.remove_node(cluster.second, allow_graceful=False)
    cluster.second = cluster.add_node(num_cpus=1)


def events_of(directory: Path, kind: str) -> list[dict]:
    events = [json.loads(path.read_text()) for path in sorted(directory.glob("events/*.json"))]
    return [event for event in events if event["kind"] == kind]


def test_chain_survives_the_loss_of_a_node(bench, reference, cluster):
    config = bench.config("two-nodes", durability={"checkpoint_seconds": 0})
    process = bench.start(config, "--address", cluster.address, env=os.environ | {"RAY_AUTH_MODE": "disabled"})
    directory = bench.directory("two-nodes")
    wait_for(lambda: list(directory.glob("train/*/*.safetensors")), process)
    lose_the_second_node(cluster)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    results = json.loads(out)
    assert results["scores"] == reference["scores"]
    assert len(events_of(directory, "segment_started")) >= 2
    for step in range(3):
        assert bench.adapter_bytes(results, step) == bench.adapter_bytes(reference, step)


def test_a_node_that_announces_its_end_leaves_a_checkpoint_at_once(bench, cluster):
    """None would be due for an hour: what the chain goes on from is what the notice has made it write."""
    config = bench.config(
        "announced",
        tasks=[bench.raw["tasks"][2]],
        training=bench.raw["training"] | {"max_steps": 1500},
        durability={"checkpoint_seconds": 3600},
    )
    process = bench.start(config, "--address", cluster.address, env=os.environ | {"RAY_AUTH_MODE": "disabled"})
    directory = bench.directory("announced")

    def training() -> bool:
        progress = directory / "progress.json"
        return progress.exists() and json.loads(progress.read_text())["kind"] == "training"

    wait_for(training, process)
    node, reason = cluster.second.node_id, "DRAIN_NODE_REASON_PREEMPTION"
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
    command = [*drain, "--node-id", node, "--reason", reason, "--reason-message", "spot price"]
    subprocess.run(command, check=True, env=os.environ | {"RAY_AUTH_MODE": "disabled"})

    wait_for(lambda: events_of(directory, "checkpoint"), process)
    lose_the_second_node(cluster)
    resumed = wait_for(lambda: events_of(directory, "resumed"), process, seconds=400)
    assert resumed[0]["step"] in {event["step"] for event in events_of(directory, "checkpoint")}
    process.terminate()  # that it goes on to its end is the test above
    process.communicate(timeout=60)
