"""The server as a Ray Serve application: one replica, which holds the base and all adapters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray import serve

from pipelines.serve.target import Plan

APPLICATION = "curlora"
STREAMS = 64  # requests beyond those that the engine takes, so that the engine refuses them and not Ray
QUIET = {"enable_access_log": False}  # metrics count the requests


@serve.ingress()
class Server:
    """A replica; Ray Serve starts it again if it ends."""

    def __init__(self, plan: Plan):
        from pipelines.serve.service import Service  # imports torch, which the driver does not need

        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("pipelines.serve").setLevel(logging.INFO)
        self.service = Service(plan)

    def __serve_build_asgi_app__(self):
        from pipelines.serve.app import make_app

        return make_app(self.service)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if not self.service.engine.is_alive:
            raise RuntimeError("the engine's thread has ended")

    async def state(self) -> dict:
        """What `/ready` says."""
        return self.service.readiness()[1]

    async def drain(self, seconds: float) -> bool:
        """Take no more requests and wait for the running ones."""
        return await asyncio.to_thread(self.service.drain, seconds)


def application(plan: Plan, gpus: int) -> serve.Application:
    """The application, for `serve.run`."""
    settings = plan.settings
    deployment = serve.deployment(
        Server,
        num_replicas=1,
        max_ongoing_requests=settings.batch_rows + settings.queue + STREAMS,
        graceful_shutdown_timeout_s=settings.drain,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": gpus},
    )
    return deployment.bind(plan)


@contextmanager
def serving(plan: Plan, alone: bool) -> Iterator[serve.handle.DeploymentHandle]:
    """Serve on the connected Ray cluster; in the end, requests that are running have `serve.drain` to finish.

    Args:
        alone: the cluster is this command's own, so that all of Ray Serve ends with it.

    Raises:
        RuntimeError: the server does not start.
    """
    settings, gpus = plan.settings, int(ray.cluster_resources().get("GPU", 0) > 0)
    serve.start(http_options={"host": settings.host, "port": settings.port}, logging_config=QUIET)
    try:
        handle = serve.run(application(plan, gpus), name=APPLICATION, route_prefix="/", logging_config=QUIET)
        try:
            yield handle
        finally:
            with suppress(ray.exceptions.RayError, TimeoutError):  # a replica that is gone has nothing to finish
                handle.drain.remote(settings.drain).result(timeout_s=settings.drain + 10)
    finally:
        serve.shutdown() if alone else serve.delete(APPLICATION)
