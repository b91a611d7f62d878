"""Resolves `base_model.dtype: auto`, once per run: the data type is part of the base's identity, so a resumed run
keeps what it was begun with, whatever the machine."""

from __future__ import annotations

from pipelines.chain.start import dtype_of_start
from pipelines.config.pipeline import PipelineConfig
from pipelines.runs.directory import RunDirectory


def with_dtype(config: PipelineConfig, run: RunDirectory | None = None, address: str | None = None) -> PipelineConfig:
    """The configuration with an explicit `base_model.dtype`; itself unless it says auto.

    auto is what the run was begun with, else what the step of `start_from` was trained with, else bfloat16 if the
    workers' device computes in it and float32 if not.

    Args:
        run: the run directory, which may have been begun.
        address: Ray cluster of the workers; None: RAY_ADDRESS, else this machine.

    Raises:
        ConfigError: `start_from` names no step.
    """
    if config.base_model.dtype != "auto":
        return config
    found = (_begun_with(run, config.base_model.path) if run else None) or dtype_of_start(config)
    if not found:
        from pipelines.workers.device import dtype_of_workers  # imports torch

        found = dtype_of_workers(config, address)
    return config.model_copy(update={"base_model": config.base_model.model_copy(update={"dtype": found})})


def _begun_with(run: RunDirectory, path: str) -> str | None:
    """The dtype that a run recorded for a base of this path."""
    if not run.exists("config.yaml"):
        return None
    base = run.config().base_model
    return base.dtype if base.path == path and base.dtype != "auto" else None
