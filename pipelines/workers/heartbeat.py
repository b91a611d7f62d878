"""A worker's signs of life: `progress.json` for those who look on, and a watchdog for when nothing moves.

A rank that waits for a lost peer, a dead disk or a deadlocked kernel waits for ever and raises nothing. So every
forward pass is a beat, and where beats must come and do not, the process says where it hangs and ends itself: Ray
Train then starts the worker group again, which goes on from the last checkpoint.
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

WRITE_SECONDS = 1.0  # at most one write of progress.json in so long

SILENCE_SECONDS = 5.0  # and at least one in so long

EXIT_CODE = 70


class Heartbeat:
    """The heartbeat of one worker process; `close` ends it.

    Args:
        writes: whether this rank writes progress.json.
        hang_timeout: seconds without a forward pass, inside `guard`, after which the process ends itself.
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
        """What is going on now; reaches progress.json within a second."""
        self._news = Event.of(kind, **details)

    def watch(self, base: nn.Module) -> None:
        """Every forward pass of this model is a beat, until `close`."""
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
        with contextlib.suppress(OSError):  # a full disk is reported by what must be written
            progress = replace(news, worker=self._identity, serial=self._serial, time=time.time())
            self.run.write_json("progress.json", progress)
        self._written = news

    def _hang(self) -> None:
        text = f"no forward pass for {self.hang_timeout:g} s (durability.hang_timeout); the worker ends itself"
        stacks = "\n".join("".join(traceback.format_stack(frame)) for frame in sys._current_frames().values())
        print(f"{text}\n{stacks}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self.run.event("hang", error=text, stacks=stacks)
        os._exit(EXIT_CODE)
