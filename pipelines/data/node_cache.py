"""Cache shared by all processes of a node, with locks and atomic publication."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Folder of the node's cache: `$CURLORA_CACHE/<name>`, by default below ~/.cache/curlora."""
    root = Path(os.environ.get("CURLORA_CACHE") or Path.home() / ".cache" / "curlora").expanduser()
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def node_lock(name: str) -> Iterator[None]:
    """Mutual exclusion of the node's processes; the system releases the lock of a process that dies."""
    from filelock import FileLock  # slow

    file = cache_folder("locks") / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"
    with FileLock(str(file)):
        yield


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `target` if the block succeeds, so that no partial file is ever seen."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
