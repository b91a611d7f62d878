"""Whether those that a configuration reports to can be reached: tools are installed, secrets are set."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import Problem

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any one of them will do


def tool_problems(config: PipelineConfig) -> Iterator[Problem]:
    """Tools of `tracking.report_to` without their package, and what `notify:` lacks."""
    for number, tool in enumerate(config.tracking.report_to if config.tracking else ()):
        packages = PACKAGES[tool]
        if not any(importlib.util.find_spec(package) for package in packages):
            message = f"{tool} is not installed; pip install {packages[0]}, or remove it"
            yield Problem(f"tracking.report_to.{number}", message)
    yield from notify_problems(config)


def notify_problems(config: PipelineConfig) -> Iterator[Problem]:
    """Environment variables of `notify:` that are not set, and a command that does not exist."""
    if config.notify is None:
        return
    for name in config.notify.variables:
        if not os.environ.get(name):
            yield Problem("notify", f"the environment variable {name} is not set; set it where the chain is driven")
    if config.notify.command and shutil.which(config.notify.command[0]) is None:
        yield Problem("notify.command", f"'{config.notify.command[0]}' is not found; write its full path")
