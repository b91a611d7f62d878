"""The server as a Ray Serve application: one replica, which holds the base and all adapters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from pipelines.serve.target import Plan, plan_of
from pipelines.workers.ray_cluster import capacity

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


def application(plan: Plan, gpus: float) -> serve.Application:
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


class Arguments(BaseModel):
    """`args` of the application in Ray Serve's configuration file, whose `http_options` say where it listens.

    Attributes:
        source, storage, uri, canary: as for `curlora serve`.
        gpus: GPUs of the replica; nodes that have some may start only afterwards.
    """

    model_config = ConfigDict(extra="forbid")
    source: str = Field(min_length=1)
    storage: str = "./runs"
    uri: str | None = None
    canary: float | None = Field(None, ge=0, le=1)
    gpus: float = Field(0, ge=0, le=1, allow_inf_nan=False)


def build(arguments: dict) -> serve.Application:
    """The application for `serve deploy` and for a RayService (`import_path: pipelines.serve.deployment:build`).

    Such a server listens beyond this machine, so its token must be in the environment (`CURLORA_SERVE_TOKEN`).

    Raises:
        ValidationError: an argument is unknown or impossible.
        ConfigError: the source cannot be served, or there is no token.
    """
    found = Arguments.model_validate(arguments)
    canary = {} if found.canary is None else {"canary": found.canary}
    plan = plan_of(found.source, found.storage, found.uri, {"host": "0.0.0.0"} | canary)
    return application(plan, found.gpus)


@contextmanager
def serving(plan: Plan, alone: bool) -> Iterator[serve.handle.DeploymentHandle]:
    """Serve on the connected Ray cluster; in the end, requests that are running have `serve.drain` to finish.

    Args:
        alone: the cluster is this command's own, so that all of Ray Serve ends with it.

    Raises:
        RuntimeError: the server does not start.
    """
    settings, gpus = plan.settings, int(capacity().get("GPU", 0) > 0)
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
