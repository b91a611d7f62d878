"""A chain worked off by a worker in this process: no Ray, one rank, real DeepSpeed."""

from __future__ import annotations

import socket

import pytest
import torch

from pipelines.chain.plan import Plan, planned
from pipelines.config.loading import parse_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.distributed import engine
from pipelines.distributed.world import World
from pipelines.runs.directory import RunDirectory
from pipelines.workers import control
from pipelines.workers.assignment import Assignment
from pipelines.workers.worker import Worker


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process rank 0 of 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(control, "node_is_leaving", lambda world: False)  # what only Ray knows
    engine.prepare_environment()


def opened(raw: dict) -> tuple[PipelineConfig, RunDirectory, Plan]:
    """The run of a configuration, open for writing."""
    config = parse_config(raw)
    run = RunDirectory(config.run_uri)
    config, plan = planned(config, run)
    run.open_for_writing(config)
    return config, run, plan


def work_off(config: PipelineConfig, run: RunDirectory, plan: Plan) -> None:
    """Train and score what the run lacks."""
    assignment = Assignment(
        run_uri=run.uri,
        config=config.model_dump(),
        steps=plan.steps,
        base_directory=plan.base_directory,
        base_fingerprint=plan.base_fingerprint,
        missing=plan.missing_cells(run),
        cell_keys=plan.cell_keys,
    )
    Worker(World(0, 1, torch.device("cpu"))).work(assignment)
