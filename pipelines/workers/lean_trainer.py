"""Ray Train's `TorchTrainer` without the helper processes that a chain does not need.

Each helper is an actor, i.e. a Python process that imports Ray, and costs 1.5 to 2 core seconds before the first
optimizer step (`tests/benchmarks/startup.py`). Left out are

- the manager of Ray Data: workers never receive a Ray Data set;
- the cleaner of placement groups: it needs a dashboard, and `WorkerGroup` releases its placement group itself;
- on a local cluster, which never grows, the requests to the autoscaler. (`RAY_TRAIN_ENABLE_PREEMPTION_WATCHER` turns
  off the watcher for preempted nodes there, see `ray_cluster.connect`.)

The helpers are recognised by name: a version of Ray that names them differently starts all of them and still works.
"""

from __future__ import annotations

import os

from ray.train.torch import TorchTrainer

from pipelines.workers.ray_cluster import LOCAL

UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")


class LeanTorchTrainer(TorchTrainer):
    """A `TorchTrainer` for workers that load their own data."""

    def _create_default_callbacks(self) -> list:
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in UNUSED]

    def _initialize_and_run_controller(self, **arguments):
        policy = arguments.get("scaling_policy")
        if os.environ.get(LOCAL) and type(policy).__name__ == "FixedScalingPolicy":
            arguments["scaling_policy"] = _without_requests(type(policy))(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


def _without_requests(policy: type) -> type:
    """`policy` without requests to the autoscaler."""

    class Still(policy):
        def after_controller_start(self, train_run_context) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return Still
