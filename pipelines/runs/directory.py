"""The run directory, the only source of truth about a run; MLflow, report and progress are projections of it.

Works on any fsspec URI and needs neither append nor rename, which object stores lack. A step is done if and only if
its `metrics.json` exists, which is written last. Layout, below `<storage>/<name>/`:

    config.yaml                      resolved configuration
    steps/<k>-<task>-<fp8>/          adapter/, bank/, heads.safetensors, strategy/, predictions/<name>.jsonl,
                                     metrics.json
    steps/0-base-<fp8>/              row 0, the untouched base: only predictions/ and metrics.json; with
                                     start_from: 0-start-<fp8>, the step that the chain continues from
    start.json                       the step that start_from resolved to
    origins/<name>/                  a plain adapter of start_from, as the only step of a run of its own
    train/<fp8>/                     checkpoints within a step; deleted when it is done
    live/<fp8>/                      curve of the step in training (live.py); deleted likewise
    search/<k>-<task>-<fp8>/         the search before a step: trials/<fp8>/ (each a run directory), results.json
    tensorboard/<k>-<task>-<fp8>/    curves for TensorBoard, if tracking.report_to names it
    events/<time>-<id>.json          immutable, one file per event
    results.json, report.html, figures/*.png
    notify/<id>.json, <id>.<n>.…     messages to the outside, attempts to deliver them (pipelines/notify)
    lease.json, progress.json, stop.json   its driver, its progress, a request to stop
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import yaml

from pipelines.config.paths import is_uri
from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import RunDirectoryError
from pipelines.runs.event import Event
from pipelines.runs.record import Record
from pipelines.runs.results import Results
from pipelines.runs.step_record import PublishedFile, StepRecord, TrainedStep, base_directory

FORMAT = 1


class RunDirectory:
    """Reads and writes one run. Paths are relative to the run and use `/`."""

    def __init__(self, uri: str):
        self.uri = uri.rstrip("/")
        self.fs, root = fsspec.core.url_to_fs(self.uri)
        self.root = root.rstrip("/")
        self.is_local = not is_uri(uri) or uri.startswith("file://")
        self._events: dict[str, Event] = {}  # immutable, so each is read only once

    @property
    def name(self) -> str:
        return posixpath.basename(self.root)

    def path(self, relative: str) -> str:
        return posixpath.join(self.root, relative)

    # -- plain files

    def exists(self, relative: str = "") -> bool:
        return self.fs.exists(self.path(relative))

    def read_bytes(self, relative: str) -> bytes:
        return self.fs.cat_file(self.path(relative))

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write an object atomically: on a local disk through a temporary name, so that no reader sees half of it."""
        path = self.path(relative)
        self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
        if not self.is_local:
            self.fs.pipe_file(path, data)
            return
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            Path(temporary).write_bytes(data)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def create(self, relative: str, data: bytes) -> bool:
        """Write a file that does not exist yet, on a local disk through to the medium; False if it exists."""
        path = self.path(relative)
        self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
        try:
            if not self.is_local:
                self.fs.pipe_file(path, data, mode="create")
                return True
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        return True

    def read_json(self, relative: str) -> Any | None:
        """The parsed file, or None if it does not exist."""
        try:
            return json.loads(self.read_bytes(relative))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_json(self, relative: str, value: Any) -> None:
        plain = value.to_json() if isinstance(value, Record) else value
        self.write_bytes(relative, json.dumps(plain, indent=1, allow_nan=False).encode())

    def read_jsonl(self, relative: str) -> list[dict]:
        return [json.loads(line) for line in self.read_bytes(relative).splitlines() if line]

    def list(self, relative: str) -> list[str]:
        """Sorted names of a folder's entries; empty if there is no such folder."""
        try:
            entries = self.fs.ls(self.path(relative), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(entry.rstrip("/")) for entry in entries if not entry.endswith(".tmp"))

    def upload(self, local: Path, relative: str) -> None:
        """Copy the files of a local folder to `relative`."""
        for file in sorted(path for path in Path(local).rglob("*") if path.is_file()):
            self.write_bytes(posixpath.join(relative, file.relative_to(local).as_posix()), file.read_bytes())

    def download(self, relative: str, local: Path) -> Path:
        """A local copy of a folder (the folder itself if the run is local)."""
        if self.is_local:
            return Path(self.path(relative))
        for file in self.fs.find(self.path(relative)):
            target = Path(local) / posixpath.relpath(file, self.path(relative))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.fs.cat_file(file))
        return Path(local)

    def remove(self, relative: str) -> None:
        """Delete a file or folder if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(relative), recursive=True)

    # -- configuration and results

    def open_for_writing(self, config: PipelineConfig) -> None:
        """Create the run, or join an existing one of the same format.

        Raises:
            RunDirectoryError: the storage is not writable, or the run was written in another format.
        """
        try:
            self.check_format()
            self.write_json("format.json", {"format": FORMAT})
            self.write_bytes("config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
        except OSError as error:
            raise self.not_writable(error) from error

    def check_format(self) -> None:
        """Raises RunDirectoryError if the run was written in another format."""
        marker = self.read_json("format.json")
        if marker is None and self.exists("steps"):
            marker = {"format": 0}
        if marker is not None and marker["format"] != FORMAT:
            raise RunDirectoryError(
                f"{self.uri} has format {marker['format']}, but this version writes {FORMAT}; use another name"
            )

    def not_writable(self, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(f"storage: {self.uri} is not writable ({error}); choose another storage")

    def config(self) -> PipelineConfig:
        return PipelineConfig.model_validate(yaml.safe_load(self.read_bytes("config.yaml")))

    def results(self) -> Results | None:
        raw = self.read_json("results.json")
        return None if raw is None else Results.from_json(raw)

    @property
    def is_finished(self) -> bool:
        """Whether results.json says that the run is finished."""
        results = self.results()
        return results is not None and results.is_finished

    # -- steps

    def metrics(self, directory: str) -> StepRecord | None:
        """`metrics.json` of a step directory; None if the step is not done."""
        raw = self.read_json(f"{directory}/metrics.json")
        return None if raw is None else StepRecord.from_json(raw)

    def trained(self, directory: str) -> TrainedStep | None:
        """`trained.json` of a step directory: trained and saved, but not done yet."""
        raw = self.read_json(f"{directory}/trained.json")
        return None if raw is None else TrainedStep.from_json(raw)

    def finished_steps(self) -> dict[str, str]:
        """Fingerprint → directory of every finished step, including row 0."""
        finished = {}
        for entry in self.list("steps"):
            metrics = self.metrics(f"steps/{entry}")
            if metrics is not None:
                finished[metrics.fingerprint] = f"steps/{entry}"
        return finished

    def find_step(self, fingerprint: str) -> str | None:
        """Directory of the finished step (or row 0) with this fingerprint; reads only folders whose name matches."""
        for entry in self.list("steps"):
            metrics = self.metrics(f"steps/{entry}") if entry.endswith(f"-{fingerprint[:8]}") else None
            if metrics and metrics.fingerprint == fingerprint:
                return f"steps/{entry}"
        return None

    def ancestors(self, directory: str) -> Iterator[tuple[RunDirectory, str, StepRecord]]:
        """(run, directory, metrics.json) of a finished step, its parent, and so on down to the base.

        Continues in another run where a chain started from that run's adapter (`parent_run` in metrics.json). A base
        that was scored on nothing has no file; its record is made up.

        Raises:
            RunDirectoryError: an ancestor no longer exists.
        """
        run, metrics = self, self.metrics(directory)
        while True:
            yield run, directory, metrics
            if metrics.parent is None:
                return
            child = directory
            run = RunDirectory(metrics.parent_run) if metrics.parent_run else run
            directory = run.find_step(metrics.parent)
            if directory is None and metrics.grew_from_base:
                yield run, base_directory(metrics.parent), metrics.unmeasured_parent()
                return
            if directory is None:
                raise RunDirectoryError(f"{run.uri} has no step {metrics.parent}, which {child} was trained from")
            metrics = run.metrics(directory)

    def damaged_files(self, directory: str, files: Mapping[str, PublishedFile]) -> list[str]:
        """Published files that are missing or have another size; contents are verified on loading."""
        damaged = []
        for name, published in files.items():
            try:
                size = self.fs.size(self.path(f"{directory}/{name}"))
            except FileNotFoundError:
                size = None
            if size != published.bytes:
                damaged.append(name)
        return damaged

    # -- events

    def event(self, kind: str, **details: Any) -> None:
        """Write one immutable event; `kind`: started, step_started, checkpoint, published, failed, finished, …"""
        event = Event.of(kind, **details)
        name = f"{int(event.time * 1e6):017d}-{uuid.uuid4().hex[:8]}"
        self.write_json(f"events/{name}.json", event)

    def read_event(self, relative: str) -> Event | None:
        """An event or progress record; None if it does not exist."""
        raw = self.read_json(relative)
        return None if raw is None else Event.from_json(raw)

    def progress(self) -> Event | None:
        """The latest progress record of the workers."""
        return self.read_event("progress.json")

    def events(self, known: Collection[str] = ()) -> Iterator[tuple[str, Event]]:
        """(name, event) in order of time, except those whose names are `known`.

        Filters by name and not by time: after a clock is set back, new events have older names.
        """
        for name in self.list("events"):
            if name in known:
                continue
            if name not in self._events and (event := self.read_event(f"events/{name}")) is not None:
                self._events[name] = event
            if name in self._events:
                yield name, self._events[name]

    # -- a request to stop

    def request_stop(self, reason: str) -> None:
        """Ask the driver and the workers to write a checkpoint and stop."""
        self.write_json("stop.json", {"reason": reason, "time": time.time()})

    def stop_requested(self) -> str | None:
        """The reason of a request to stop, or None."""
        request = self.read_json("stop.json")
        return request["reason"] if request else None
