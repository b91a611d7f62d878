"""Fingerprints of base models and steps, and the plan of a step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.paths import is_gguf, looks_local
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.sections import BaseModelConfig
from pipelines.errors import ConfigError, Problem
from pipelines.runs.step_record import Setting, step_label

WHOLE_FILE = 1 << 30  # larger weight files are fingerprinted by samples


def base_fingerprint(base: BaseModelConfig) -> str:
    """Identity of a base: its files' content (samples of very large files), or hub id and commit; dtype; bits.

    Raises:
        ConfigError: there is no such file or folder.
        ValueError: the dtype is still auto.
    """
    if base.dtype == "auto":
        raise ValueError("base_model.dtype: auto has no identity; chain/base_dtype.py resolves it first")
    numbers = {"dtype": base.dtype} | ({"quantization": base.quantization} if base.quantization else {})
    if not looks_local(base.path):
        return fingerprint({"hub": base.path, "commit": _hub_commit(base), **numbers})
    folder = Path(base.path)
    if is_gguf(base.path) and folder.is_file():
        return fingerprint({"gguf": file_digest(folder), **numbers})
    if not folder.is_dir():
        raise ConfigError(
            [
                Problem(
                    "base_model.path",
                    f"'{base.path}': no such {'file' if is_gguf(base.path) else 'folder'}; check the path or hub id",
                )
            ]
        )
    names = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    return fingerprint({"files": {p.name: file_digest(p) for p in names}, **numbers})


def _hub_commit(base: BaseModelConfig) -> str | None:
    # slow, and needed only for hub models
    from transformers.utils.hub import cached_file, extract_commit_hash

    file = cached_file(base.path, "config.json", revision=base.revision)
    return extract_commit_hash(file, None)


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of its size and 65 evenly spread MiB if it is larger than 1 GiB."""
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_FILE:
            while block := file.read(1 << 20):
                sha.update(block)
        else:
            for part in range(65):
                file.seek(part * (size - (1 << 20)) // 64)
                sha.update(file.read(1 << 20))
    return sha.hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, 32 hex digits (MLflow digests hold 36)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def live_folder(fingerprint: str) -> str:
    """Folder of what a step tells during training, see `runs/live.py`."""
    return f"live/{fingerprint[:8]}"


@dataclass(frozen=True)
class StepPlan:
    """One step of the chain: its tasks, its parent and its directory.

    `position` counts from 1 (row 0 is the base or the step of `start_from`); `tasks` has one name, or under `joint`
    all of them; `earlier` is the depth of the step that the chain continues from, 0 for a base.
    """

    position: int
    tasks: tuple[str, ...]
    fingerprint: str
    parent: str | None
    earlier: int = 0

    @property
    def depth(self) -> int:
        """Steps from the base to this one, inclusive; seeds depend on it."""
        return self.earlier + self.position

    @property
    def label(self) -> str:
        return step_label(self.tasks)

    @property
    def directory(self) -> str:
        return f"steps/{self.position}-{self.label}-{self.fingerprint[:8]}"

    @property
    def checkpoints(self) -> str:
        """Folder of its checkpoints during training."""
        return f"train/{self.fingerprint[:8]}"

    @property
    def live(self) -> str:
        """Folder of what it tells during training."""
        return live_folder(self.fingerprint)

    @property
    def identity(self) -> dict:
        """Fields that identify this step in events and progress records."""
        return {"fingerprint": self.fingerprint, "task": self.label, "position": self.position}

    def to_json(self) -> dict:
        return {
            "position": self.position,
            "tasks": list(self.tasks),
            "fingerprint": self.fingerprint,
            "parent": self.parent,
            "earlier": self.earlier,
        }

    @classmethod
    def from_json(cls, raw: dict) -> StepPlan:
        return cls(raw["position"], tuple(raw["tasks"]), raw["fingerprint"], raw["parent"], raw["earlier"])


def step_fingerprint(base: str, parent: str, config: PipelineConfig, tasks: list[dict]) -> str:
    """Identity of a step: its base, parent, settings and training data (`tasks`: identities of their data)."""
    return fingerprint(
        {
            "base": base,
            "parent": parent,
            **Setting.of(config).to_json(),
            "tasks": tasks,
        }
    )
