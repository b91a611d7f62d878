"""A worker group that is ended by force leaves room for the next one."""

import ray

from pipelines.config.loading import parse_config
from pipelines.workers.group import WorkerGroup
from tests.bench import wait_for


def test_a_group_ended_by_force_gives_back_what_its_workers_held(warm_workers, tmp_path):
    warm_workers.connect()
    data = {"name": "t", "kind": "language-modeling", "data": str(tmp_path)}
    most = {"workers": 1, "cpus_per_worker": 0.6 * ray.cluster_resources()["CPU"], "gpus_per_worker": 0}
    raw = {"name": "g", "base_model": {"path": str(tmp_path)}, "storage": str(tmp_path), "tasks": [data]}
    group = WorkerGroup(parse_config(raw | {"resources": most}), str(tmp_path / "g"), 0)
    places = []
    for _ in range(2):
        group.start()
        places.append(wait_for(lambda: group.queue.placement_group))
        group.kill()
    assert places[0] != places[1]  # there is room for one at a time only
