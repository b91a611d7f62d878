"""Finds the files of a split in a folder, and copies remote files to this node."""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import re
from collections.abc import Iterator

from pipelines.config.paths import is_uri, looks_local
from pipelines.data.node_cache import cache_folder, node_lock, published
from pipelines.errors import DataError, Problem

# suffix -> builder of `datasets`
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


def folder_name(path: str) -> str:
    return posixpath.basename(posixpath.dirname(path))


def reason_of(error: BaseException) -> str:
    """The innermost cause of an error in one line, since `datasets` wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def format_of(path: str) -> str | None:
    """The suffix of a data file, or None if it is no supported format."""
    suffix = posixpath.splitext(path)[1].lower()
    return suffix if suffix in FORMATS else None


def folder_files(data: str, expression: str) -> dict[str, tuple[str, ...]]:
    """Name → files of every part that a split expression names."""
    stems = re.findall(r"(?:^|\+)\s*([^\s\[+@]+)", expression)
    return {stem: tuple(_files_of_part(data, stem)) for stem in dict.fromkeys(stems)}


def _files_of_part(data: str, stem: str) -> list[str]:
    fs, root = _filesystem(data)
    names = _names(fs, root, data)
    found = [name for name in names if posixpath.splitext(name)[0] == stem and format_of(name)]
    found = found or [name for name in names if name.startswith(f"{stem}-") and format_of(name)]
    if not found and stem in names:
        inner = _names(fs, posixpath.join(root, stem), data)
        found = [posixpath.join(stem, name) for name in inner if format_of(name)]
    if not found:
        there = f"the folder holds: {', '.join(names[:20])}" if names else "check the path"
        raise DataError([Problem(f"{data.rstrip('/')}/{stem}.jsonl", f"no such file; {there}")])
    # the same rows in several formats: the first of FORMATS is used
    chosen = min((format_of(name) for name in found), key=list(FORMATS).index)
    return [f"{data.rstrip('/')}/{name}" for name in found if format_of(name) == chosen]


def _filesystem(path: str):
    import fsspec  # slow

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        remedy = "install the package it needs (s3: pip install 's3fs') or correct the protocol"
        raise DataError([Problem(path, f"{reason_of(error)}; {remedy}")]) from error


@contextlib.contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """Turn errors of a file system into a DataError that names the path. Errors of botocore are no OSError."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError([Problem(path, "no such file; check the path")]) from error
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("botocore", "aiobotocore")):
            raise
        remedy = "check the path, the network and the credentials"
        raise DataError([Problem(path, f"cannot be read ({reason_of(error)}); {remedy}")]) from error


def _names(fs, folder: str, data: str) -> list[str]:
    """Sorted names in a folder; empty if it does not exist."""
    with _storage_errors(data):
        if not fs.isdir(folder):
            return []
        names = [posixpath.basename(p.rstrip("/")) for p in fs.ls(folder, detail=False)]
        return sorted(name for name in names if name)


def local_copy(path: str) -> str:
    """Local path of a file. A remote file is copied once per node, and again when it has changed.

    Raises:
        DataError: it does not exist or cannot be read.
    """
    fs, plain = _filesystem(path)
    with _storage_errors(path):
        if "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)):
            if not os.path.isfile(plain):
                raise FileNotFoundError(plain)
            return plain
        identity = hashlib.sha256(f"{path}\n{fs.ukey(plain)}".encode()).hexdigest()[:32]
        target = cache_folder("files") / identity / posixpath.basename(plain)
        with node_lock(f"file-{identity}"):
            if not target.exists():
                with published(target) as temporary:
                    fs.get_file(plain, str(temporary))
        return str(target)


def read_sibling(data: str, name: str) -> bytes | None:
    """Content of the file `name` in a data folder; None if there is no such file."""
    if format_of(data) or not (is_uri(data) or looks_local(data)):
        return None
    fs, root = _filesystem(data)
    with _storage_errors(data):
        path = posixpath.join(root, name)
        return fs.cat_file(path) if fs.isfile(path) else None
