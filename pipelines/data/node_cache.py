"""A cache folder that all processes of a node share, with locks and atomic publication."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder that the processes of a node share."""
    root = Path(os.environ.get("CURLORA_CACHE") or Path.home() / ".cache" / "curlora").expanduser()
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def node_lock(name: str) -> Iterator[None]:
    """One process of this node at a time; released by the system when a process dies."""
    from filelock import FileLock  # slow

    file = cache_folder("locks") / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"
    with FileLock(str(file)):
        yield


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """A temporary path that becomes `target` when the block ends well, so that nobody sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
