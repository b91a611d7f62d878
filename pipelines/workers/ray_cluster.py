"""The Ray cluster that a command runs on: the given one, or a local one that ends with the command.

A local cluster starts in the background while the driver validates its input (`early_cluster`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, Problem

LOCAL = "CURLORA_LOCAL_CLUSTER"  # set in the processes of a cluster that was started for one command

# a single node that is neither preempted nor joined by others
LOCAL_SETTINGS = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", LOCAL: "1"}

# How long a worker's threads spin for the next parallel region. GNU OpenMP's default lets two processes of two threads
# on two cores starve each other (13 instead of 130 tokens/s); passive waiting makes one alone 3 times slower.
SPIN_COUNT = "10000"

CLUSTER_MAX = "CURLORA_CLUSTER_MAX"
"""Environment variable of an autoscaling cluster: what it may grow to, e.g. `CPU=32,GPU=4`; Ray itself cannot say."""

_early: Future | None = None


@contextlib.contextmanager
def early_cluster(verbose: bool = False, address: str | None = None) -> Iterator[None]:
    """Start a local cluster in the background for a `cluster` entered inside; end it if none is entered."""
    global _early
    import ray  # slow

    if address or os.environ.get("RAY_ADDRESS") or ray.is_initialized() or _early:
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="ray") as pool:
        _early = pool.submit(connect, verbose)
        try:
            yield
        finally:
            unused, _early = _early, None
            if unused:
                unused.exception()
                ray.shutdown()


@contextlib.contextmanager
def cluster(config: PipelineConfig, verbose: bool = False, address: str | None = None) -> Iterator[None]:
    """A Ray cluster: the connected one, else `address`, else RAY_ADDRESS, else a local one that ends with the context.

    Raises:
        ConfigError: the workers can never be placed there.
    """
    global _early
    import ray  # slow

    early, _early = _early, None
    mine = early is not None or not ray.is_initialized()
    try:
        if early:
            early.result()
            _set_sigterm(signal.getsignal(signal.SIGTERM))
        elif mine:
            connect(verbose, address)
        check_cluster(config, capacity())
        yield
    finally:
        if mine:
            ray.shutdown()


def connect(verbose: bool = False, address: str | None = None) -> None:
    """`ray.init`, without Ray's log messages on the user's terminal."""
    local = not (address or os.environ.get("RAY_ADDRESS"))
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray  # slow

    settings = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    if local:
        # otherwise Ray joins the cluster that was last started on this machine, or waits for one that is dead
        settings |= {"address": "local", "include_dashboard": False}
    else:
        settings |= {"address": address or os.environ["RAY_ADDRESS"]}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if local:
        set_spinning()
    with _environment(LOCAL_SETTINGS if local else {}):  # inherited by Ray's processes
        ray.init(**settings)
    _set_sigterm(on_sigterm)


def set_spinning() -> None:
    """Set `GOMP_SPINCOUNT`, unless the user has, for child processes and, before torch is imported, for this one."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def _set_sigterm(handler) -> None:
    """Restores our SIGTERM handler: Ray's own, unknown to Python, ends the process before the workers can save."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def capacity() -> dict[str, float]:
    """Resources that the connected cluster has, or that it may grow to (`CLUSTER_MAX`).

    Raises:
        ConfigError: the variable cannot be read.
    """
    import ray  # slow

    return grown(ray.cluster_resources(), os.environ.get(CLUSTER_MAX, ""))


def grown(resources: dict[str, float], most: str) -> dict[str, float]:
    """Resources of a cluster after its autoscaler has added what it may, e.g. `CPU=32,GPU=4`."""
    found = dict(resources)
    for part in filter(None, (part.strip() for part in most.split(","))):
        kind, _, amount = part.partition("=")
        if kind not in ("CPU", "GPU") or not amount.isdecimal() or len(amount) > 9:
            raise ConfigError([Problem(CLUSTER_MAX, f"'{part[:60]}' cannot be read; write e.g. CPU=32,GPU=4")])
        found[kind] = max(float(amount), found.get(kind, 0.0))
    return found


def check_cluster(config: PipelineConfig, resources: dict) -> None:
    """Raises ConfigError if the workers can never be placed: Ray itself would wait for ever."""
    workers = config.resources.workers
    gpus = gpus_per_worker(config, resources)
    for name, kind, each in (("cpus_per_worker", "CPU", config.resources.cpus_per_worker), ("gpus", "GPU", gpus)):
        there = resources.get(kind, 0)
        if workers * each > there:
            raise ConfigError(
                [
                    Problem(
                        "resources.workers",
                        f"{workers} workers need {workers * each:g} {kind}, the cluster has {there:g}; "
                        f"lower resources.workers or resources.{name}, or add nodes",
                    )
                ]
            )


def gpus_per_worker(config: PipelineConfig, resources: dict | None = None) -> float:
    """GPUs per worker; `auto` means one if the cluster has any or may get some, else none."""
    value = config.resources.gpus_per_worker
    if value != "auto":
        return value
    if resources is None:
        resources = capacity()
    return 1.0 if resources.get("GPU", 0) else 0.0
