"""A worker group that is ended by force leaves room for the next one."""

import pytest
import ray

from pipelines.config.loading import parse_config
from pipelines.workers.group import WorkerGroup
from pipelines.workers.ray_cluster import connect
from tests.bench import wait_for


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect()
    yield ray.cluster_resources()
    ray.shutdown()


def test_a_group_ended_by_force_gives_back_what_its_workers_held(cluster, tmp_path):
    data = {"name": "t", "kind": "language-modeling", "data": str(tmp_path)}
    everything = {"workers": 1, "cpus_per_worker": cluster["CPU"], "gpus_per_worker": 0}
    raw = {"name": "g", "base_model": {"path": str(tmp_path)}, "storage": str(tmp_path), "tasks": [data]}
    group = WorkerGroup(parse_config(raw | {"resources": everything}), str(tmp_path / "g"), 0)
    places = []
    for _ in range(2):
        group.start()
        places.append(wait_for(lambda: group.queue.placement_group))
        group.kill()
    assert places[0] != places[1]  # there is room for one at a time only
