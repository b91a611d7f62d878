"""Whether the tools that a configuration reports to are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import Problem

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any one of them will do


def tool_problems(config: PipelineConfig) -> Iterator[Problem]:
    """Tools of `tracking.report_to` without their package."""
    for number, tool in enumerate(config.tracking.report_to if config.tracking else ()):
        packages = PACKAGES[tool]
        if not any(importlib.util.find_spec(package) for package in packages):
            message = f"{tool} is not installed; pip install {packages[0]}, or remove it"
            yield Problem(f"tracking.report_to.{number}", message)
