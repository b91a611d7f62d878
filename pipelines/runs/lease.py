"""One driver per run at a time: a lease with a heartbeat."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid

from pipelines.errors import LeaseHeld
from pipelines.runs.directory import RunDirectory

LEASE_SECONDS = 15.0  # without a new beat, after which a lease may be taken over
BEAT_SECONDS = 3.0  # between two beats


class Lease:
    """A heartbeat file. It is taken over at once from a dead process of this host, else after 15 s without a new beat.

    Beats are counted and never compared with a clock, because the clocks of two hosts differ and may be set back.
    """

    def __init__(self, run: RunDirectory):
        self.run = run
        self.token = uuid.uuid4().hex
        self.lost = False
        self._beats = 0
        self._take()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="lease")
        self._thread.start()

    def _take(self) -> None:
        holder = driver_of(self.run)
        if holder and self._beats_on(holder):
            raise LeaseHeld(
                f"run '{self.run.name}' is in use by process {holder['pid']} on {holder['host']}; "
                f"wait until it ends, or stop it: curlora cancel {self.run.uri}"
            )
        self._beat()
        if self._holder_token() != self.token:
            raise LeaseHeld(f"run '{self.run.name}' has just been taken over by another driver; try again later")

    def _beats_on(self, holder: dict) -> bool:
        """Watch the lease: True once it changes, False if it does not within `LEASE_SECONDS`."""
        if holder["host"] == socket.gethostname():
            return True  # `driver_of` has found the process alive
        end = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < end:
            time.sleep(0.25)
            now = self.run.read_json("lease.json")
            if now is None:
                return False
            if (now["token"], now["beats"]) != (holder["token"], holder["beats"]):
                return True
        return False

    def _holder_token(self) -> str | None:
        return (self.run.read_json("lease.json") or {}).get("token")

    def _beat(self) -> None:
        self._beats += 1
        self.run.write_json(
            "lease.json",
            {
                "token": self.token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": _process_start(os.getpid()),
                "beats": self._beats,
                "time": time.time(),  # for people, and for `run_status`
            },
        )

    def _loop(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if self._holder_token() != self.token:
                    self.lost = True
                    return
                self._beat()
            except OSError:
                continue  # the disk may become available again; a takeover in the meantime is noticed above

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._holder_token() == self.token:
                self.run.remove("lease.json")

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire_lease(run: RunDirectory) -> Lease:
    """Take the lease of a run.

    Raises:
        LeaseHeld: another driver is alive (a beat within 15 s; dead processes of this host do not count).
        RunDirectoryError: the storage is not writable.
    """
    try:
        return Lease(run)
    except OSError as error:
        raise run.not_writable(error) from error


def driver_of(run: RunDirectory) -> dict | None:
    """The lease of a driver that may be alive: its `host`, `pid`, `token`; None if there is certainly no driver."""
    holder = run.read_json("lease.json")
    return holder if holder and not _is_dead(holder) else None


def _is_dead(holder: dict) -> bool:
    """Whether a lease belongs to a process of this host that no longer exists."""
    return holder["host"] == socket.gethostname() and not _same_process(holder["pid"], holder["started"])


def _process_start(pid: int) -> float | None:
    """Start time of a process, which tells it from a later one with the same pid."""
    import psutil  # comes with ray; only a driver needs it

    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def _same_process(pid: int, started: float | None) -> bool:
    now = _process_start(pid)
    return now is not None and (started is None or abs(now - started) < 1.0)
