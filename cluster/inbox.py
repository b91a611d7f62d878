"""The inbox of new domains: a folder or bucket prefix with one folder per domain, written by others.

Its content is untrusted: names must be safe, symbolic links and odd paths are refused, and only data files are read,
so a domain can bring neither code nor configuration. A scan lists names, sizes and versions (modification times or
etags) and reads no content.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import fsspec

from pipelines.config.sections import SAFE_NAME
from pipelines.data.files import FORMATS
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import fingerprint

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

DEPTH = 2  # levels of folders: the domain's own and one per split
COPIED = "_COPIED"  # marks a complete copy
# keys under which the file systems of fsspec report modification times and versions
TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
TAGS = ("ETag", "etag", "md5Hash", "crc32c")


@dataclass(frozen=True)
class File:
    """A data file: its path inside the domain, its size in bytes, and a version that changes with its content."""

    path: str
    size: int
    version: str


@dataclass
class Domain:
    """A folder of the inbox, as listed.

    Attributes:
        inbox: folder or URI that it was found in.
        newest: modification time of its newest file in Unix seconds; None if the storage reports none.
        marked: whether it contains the marker of completeness.
        problems: names and paths that cannot be accepted, each with a remedy.
    """

    name: str
    files: list[File] = field(default_factory=list)
    newest: float | None = None
    marked: bool = False
    problems: list[str] = field(default_factory=list)
    inbox: str = ""

    @property
    def stamp(self) -> str:
        """Version of the domain: changes when a file is added, changed or removed."""
        files = sorted((file.path, file.size, file.version) for file in self.files)
        return fingerprint([files, sorted(self.problems)])[:16]

    @property
    def key(self) -> str:
        """Its name, or a substitute if the name is not safe in file names."""
        return self.name if SAFE_NAME.fullmatch(self.name) else f"unsafe-{fingerprint(self.name)[:8]}"

    def is_complete(self, quiet_seconds: float, now: float) -> bool:
        """Whether it has its marker, or has not changed for `quiet_seconds`."""
        rested = self.newest is not None and now - self.newest >= quiet_seconds
        return self.marked or bool(self.files and rested)


def scan(inbox: str, marker: str) -> list[Domain]:
    """All domains of an inbox, oldest first.

    Raises:
        OSError: the inbox cannot be listed.
    """
    fs, root = fsspec.core.url_to_fs(inbox)
    found = _local(root, marker) if _is_local(fs) else _remote(fs, root.rstrip("/"), marker)
    for domain in found:
        domain.inbox = inbox
        if not SAFE_NAME.fullmatch(domain.name):
            domain.problems.append(f"'{domain.name}' is not a safe name; use letters, digits, _ and - (at most 64)")
    return sorted(found, key=lambda domain: (domain.newest or 0.0, domain.name))


def _is_local(fs) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


# -- local folders
def _local(root: str, marker: str) -> list[Domain]:
    found = []
    for entry in os.scandir(root):
        if entry.name.startswith((".", "_")):
            continue
        if entry.is_symlink():
            found.append(Domain(entry.name, problems=["is a symbolic link; put the folder itself into the inbox"]))
        elif entry.is_dir():
            found.append(_local_domain(entry, marker))
    return found


def _local_domain(folder: os.DirEntry, marker: str) -> Domain:
    domain = Domain(folder.name, newest=folder.stat().st_mtime)
    for path, entry in _entries(folder.path, ""):
        if path == marker and not entry.is_symlink():
            domain.marked = True
            continue
        state = entry.stat(follow_symlinks=False)
        refused_as = "a symbolic link" if entry.is_symlink() else None if entry.is_file() else "no plain file"
        _add(domain, path, state.st_size, str(state.st_mtime_ns), state.st_mtime, refused_as)
    return domain


def _entries(folder: str, prefix: str) -> Iterator[tuple[str, os.DirEntry]]:
    """(path, entry) of all files and links below a folder; links are not followed."""
    for entry in os.scandir(folder):
        path = f"{prefix}{entry.name}"
        if entry.is_dir(follow_symlinks=False) and path.count("/") < DEPTH:
            yield from _entries(entry.path, f"{path}/")
        else:
            yield path, entry


# -- buckets
def _remote(fs, root: str, marker: str) -> list[Domain]:
    fs.invalidate_cache()
    found: dict[str, Domain] = {}
    for key, info in fs.find(root, detail=True).items():
        name, _, path = posixpath.relpath(key, root).partition("/")
        if not path or name.startswith((".", "_")):
            continue
        domain = found.setdefault(name, Domain(name))
        if path == marker:
            domain.marked = True
            continue
        moment = _seconds(next((info[key] for key in TIMES if info.get(key)), None))
        version = next((str(info[key]) for key in TAGS if info.get(key)), str(moment))
        _add(domain, path, info["size"], version, moment, None)
    return list(found.values())


def _seconds(value) -> float | None:
    if isinstance(value, str):
        value = datetime.fromisoformat(value.replace("Z", "+00:00"))
    return value.timestamp() if isinstance(value, datetime) else value


def _add(domain: Domain, path: str, size: int, version: str, moment: float | None, refused_as: str | None) -> None:
    """Add a file to a domain, or a problem if it is something else or its path is not safe."""
    *folders, name = path.split("/")
    if name.startswith((".", "_")):
        return  # left by other programs
    if refused_as:
        domain.problems.append(f"{path} is {refused_as}; put the file itself there")
    elif len(folders) >= DEPTH or not all(map(FILE_NAME.fullmatch, (*folders, name))) or ".." in path:
        domain.problems.append(f"{path!r} is not a safe path; use letters, digits, '.', _ and -, one folder deep")
    elif posixpath.splitext(name)[1].lower() in FORMATS:
        domain.files.append(File(path, size, version))
    if moment is not None:
        domain.newest = max(domain.newest or 0.0, moment)


# -- copying a domain
def copy_domain(inbox: str, domain: Domain, marker: str, target: RunDirectory, folder: str) -> str | None:
    """Copy a domain's data files below `target`, so that exactly what was checked is trained; returns the copy's URI.

    Returns None if the domain changed meanwhile, i.e. was not complete. An existing copy is kept.
    """
    uri = f"{target.uri}/{folder}"
    if target.exists(f"{folder}/{COPIED}"):
        return uri
    fs, root = fsspec.core.url_to_fs(inbox)
    try:
        for file in domain.files:
            _copy(fs, posixpath.join(root, domain.name, file.path), target, f"{folder}/{file.path}")
    except OSError:
        if not _changed(inbox, domain, marker):
            raise
    if _changed(inbox, domain, marker):
        target.remove(folder)
        return None
    target.write_json(f"{folder}/{COPIED}", {"domain": domain.name, "stamp": domain.stamp})
    return uri


def _changed(inbox: str, domain: Domain, marker: str) -> bool:
    now = next((other for other in scan(inbox, marker) if other.name == domain.name), None)
    return now is None or now.stamp != domain.stamp


def _copy(fs, source: str, target: RunDirectory, path: str) -> None:
    destination = target.path(path)
    target.fs.makedirs(posixpath.dirname(destination), exist_ok=True)
    with _open(fs, source) as incoming, target.fs.open(destination, "wb") as outgoing:
        shutil.copyfileobj(incoming, outgoing, 1 << 20)


def _open(fs, path: str):
    """Open a file for reading; on a local disk, refuse a symbolic link that replaced it after the listing."""
    if not _is_local(fs):
        return fs.open(path, "rb")
    return open(os.open(Path(path), os.O_RDONLY | os.O_NOFOLLOW), "rb")
