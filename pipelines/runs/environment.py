"""The environment of a step: versions, hardware, commit of this code. Recorded, but not part of any fingerprint."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("curlora", "torch", "transformers", "peft", "deepspeed", "ray", "datasets")
GIT_SECONDS = 10.0  # timeout of a git command


def describe(world_size: int, deepspeed_stage: int, device: str) -> dict:
    """Package versions, hardware, and the commit if this code is a git checkout."""
    return {
        **versions(),
        "python": sys.version.split()[0],
        "world_size": world_size,
        "deepspeed_stage": deepspeed_stage,
        "device": device,
        "hardware": hardware(device),
        **git(),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed; a cluster job runs this code from a folder, without a version."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware(device: str) -> dict:
    """Processor, cores and memory of this node; name, memory and number of GPUs if the worker has one."""
    found = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device == "cuda":
        import torch  # slow, but already imported in a worker

        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "gpu": card.name,
            "gpu_memory_gib": round(card.total_memory / 2**30, 1),
            "gpus": torch.cuda.device_count(),
        }
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


@functools.cache
def git() -> dict:
    """`git_commit`, and whether tracked files differ from it; empty if this code is installed as a package.

    A package inside another repository (in its virtual environment, say) is not a checkout: this file is not tracked.
    """
    here = Path(__file__).resolve()
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    commit = _git(here.parent, "rev-parse", "HEAD") if tracked else None
    if not commit:
        return {}
    return {"git_commit": commit, "git_changed": bool(_git(here.parent, "status", "--porcelain", "-uno"))}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None if it fails or git is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
