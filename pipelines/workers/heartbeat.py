"""A worker's heartbeat: `progress.json` for observers, and a watchdog against hangs.

A rank that waits for a lost peer, a dead disk or a deadlocked kernel waits for ever without raising an error.
Therefore every forward pass counts as a beat. If beats are due but missing, the process reports where it hangs and
exits; Ray Train then restarts the worker group, which resumes from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event

WRITE_SECONDS = 1.0  # least time between two writes of progress.json
SILENCE_SECONDS = 5.0  # the most time between two writes
EXIT_CODE = 70


class Heartbeat:
    """The heartbeat thread of one worker process; `close` ends it.

    Args:
        writes: whether this rank writes progress.json.
        hang_timeout: seconds without a forward pass, inside `guard`, after which the process exits.
    """

    def __init__(self, run: RunDirectory, writes: bool, hang_timeout: float):
        self.run, self.writes, self.hang_timeout = run, writes, hang_timeout
        self._identity = uuid.uuid4().hex[:8]
        self._serial = 0
        self._news = Event("loading")
        self._written: Event | None = None
        self._guarded = False
        self._last_beat = time.monotonic()
        self._hook = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="heartbeat")
        self._thread.start()

    def report(self, kind: str, **details) -> None:
        """Set the current activity; it reaches progress.json within a second."""
        self._news = Event.of(kind, **details)

    def watch(self, base: nn.Module) -> None:
        """Count every forward pass of this model as a beat, until `close`."""
        self._hook = base.get_input_embeddings().register_forward_pre_hook(lambda *_: self.beat())

    def beat(self) -> None:
        self._last_beat = time.monotonic()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Inside, a forward pass must come at least every `hang_timeout` seconds."""
        self.beat()
        before, self._guarded = self._guarded, True
        try:
            yield
        finally:
            self._guarded = before

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._hook:
            self._hook.remove()

    def _loop(self) -> None:
        written = 0.0
        while not self._stop.wait(WRITE_SECONDS / 4):
            now = time.monotonic()
            if self._guarded and now - self._last_beat > self.hang_timeout:
                self._hang()
            news = self._news
            age = now - written
            if self.writes and (age > SILENCE_SECONDS or (news is not self._written and age > WRITE_SECONDS)):
                self._write(news)
                written = now

    def _write(self, news: Event) -> None:
        self._serial += 1
        with contextlib.suppress(OSError):  # a full disk surfaces where a write is required
            progress = replace(news, worker=self._identity, serial=self._serial, time=time.time())
            self.run.write_json("progress.json", progress)
        self._written = news

    def _hang(self) -> None:
        text = f"no forward pass for {self.hang_timeout:g} s (durability.hang_timeout); the worker exits"
        stacks = "\n".join("".join(traceback.format_stack(frame)) for frame in sys._current_frames().values())
        print(f"{text}\n{stacks}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self.run.event("hang", error=text, stacks=stacks)
        os._exit(EXIT_CODE)
