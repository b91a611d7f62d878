"""Ray Train's `TorchTrainer` without helper processes that a chain has no use for.

Each helper is an actor, a Python process that imports Ray: 1.5 to 2 s of a core before the first optimizer step
(`tests/benchmarks/startup.py`). Left out are

- Ray Data's manager: no Ray Data set is ever handed over;
- the cleaner of placement groups: it asks a dashboard for the controller, `WorkerGroup` gives back what it holds;
- on a local cluster, which never grows, the requests to the autoscaler. (The watch for preempted nodes is left out
  there by `RAY_TRAIN_ENABLE_PREEMPTION_WATCHER`, see `ray_cluster.connect`.)

They are told by name: a Ray in which they are named otherwise starts all of them, and works.
"""

from __future__ import annotations

import os

from ray.train.torch import TorchTrainer

from pipelines.workers.ray_cluster import LOCAL

UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")


class LeanTorchTrainer(TorchTrainer):
    """A `TorchTrainer` for workers that read their data themselves."""

    def _create_default_callbacks(self) -> list:
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in UNUSED]

    def _initialize_and_run_controller(self, **arguments):
        policy = arguments.get("scaling_policy")
        if os.environ.get(LOCAL) and type(policy).__name__ == "FixedScalingPolicy":
            arguments["scaling_policy"] = _without_requests(type(policy))(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


def _without_requests(policy: type) -> type:
    """`policy`, but it asks no autoscaler for nodes."""

    class Still(policy):
        def after_controller_start(self, train_run_context) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return Still
