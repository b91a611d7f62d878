"""Runs a few chains one after another on the same workers: the base is loaded and scored once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from pipelines.chain.base_dtype import with_dtype
from pipelines.chain.driver import run_chain
from pipelines.chain.plan import make_plan
from pipelines.comparison.compare import reuse_base_scores
from pipelines.config.pipeline import PipelineConfig
from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.runs.results import Results
from pipelines.workers.group import WorkerGroup
from pipelines.workers.ray_cluster import cluster, gpus_per_worker

ProgressOf = Callable[[PipelineConfig], AbstractContextManager[Callable[[Event], None]]]


def run_side_by_side(
    configs: Sequence[PipelineConfig], progress_of: ProgressOf, verbose: bool = False, address: str | None = None
) -> list[Results]:
    """Train what is missing of every chain, in order; their results. Continues where it was interrupted.

    Args:
        configs: chains with the same base and the same storage.
        progress_of: gives a context manager whose value is called with every event of the chain.

    Raises:
        ConfigError, RunFailed, RunStopped: as `run_chain`.
    """
    configs = [with_dtype(config, RunDirectory(config.run_uri), address) for config in configs]

    def run(config: PipelineConfig, group: WorkerGroup | None = None) -> Results:
        with progress_of(config) as progress:
            return run_chain(config, progress, verbose, address=address, group=group)

    if all(RunDirectory(config.run_uri).is_finished for config in configs):
        return [run(config) for config in configs]
    first, found = configs[0], []
    with cluster(first, verbose, address):
        group = WorkerGroup(first, first.storage, gpus_per_worker(first), verbose)
        group.start()
        try:
            for config in configs:
                reuse_base_scores(config, make_plan(config))
                found.append(run(config, group))
        finally:
            group.close()
    return found
