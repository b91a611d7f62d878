"""A monkey that breaks a running chain, one way at a time, and starts it again until it is done."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipelines.lineage.store import ui_command, ui_environment
from tests.bench import Bench, all_gone, wait_for

DRIVER_SURVIVES = ("worker", "hang", "mlflow")
DAMAGES = ("worker", "raylet", "driver", "mlflow", "disk", "sigterm", "hang")
SOON_SECONDS = 5.0
START_SECONDS = 240.0
# Ray misses a raylet after 15 s by default: enough for a short chain to end well without one
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class Server:
    """`mlflow server` on loopback over a SQLite store; can be killed and started again."""

    uri: str
    port: int
    process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.process = subprocess.Popen(ui_command(self.uri, self.port), env=ui_environment(), **quiet)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Chaos:
    """Runs `config` to its end through the given damages, each at a random moment.

    Attributes:
        log: what was done: (damage, seconds after the start of the driver, phase that the run was in).
    """

    bench: Bench
    config: Path
    name: str
    server: Server
    disk: Path | None
    rng: random.Random
    log: list[tuple[str, float, str]] = field(default_factory=list)

    def run(self, damages: list[str]) -> dict:
        """results.json of the finished run."""
        process, same_workers = self._start(), False
        for damage in damages:
            begun = time.monotonic()
            if not self._wait_for_a_moment(process, same_workers):
                break  # it was quicker than the monkey
            self.log.append((damage, round(time.monotonic() - begun, 1), self._phase()))
            before = descendants(process)
            getattr(self, f"_{damage}")(process)
            same_workers = damage == "mlflow"
            if damage in DRIVER_SURVIVES:
                continue
            out, err = process.communicate(timeout=START_SECONDS)
            if damage == "raylet" and process.returncode == 0:
                return json.loads(out)  # its workers were done before anybody missed it
            assert process.returncode != 0, f"{damage}: the driver ended well\n{out}\n{err}"
            if damage == "sigterm":
                wait_for(lambda pids=before: all_gone(pids), seconds=10)  # no stray processes
            self._mend()
            process = self._start()
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err  # every damage that ends a driver was waited for above
        return json.loads(out)

    def _start(self) -> subprocess.Popen:
        return self.bench.start(self.config, env=os.environ | QUICK_HEALTH_CHECKS)

    def _phase(self) -> str:
        try:
            progress = json.loads((self._directory / "progress.json").read_text())
        except (OSError, ValueError):
            return "before the workers"
        return " ".join(str(progress[key]) for key in ("kind", "task", "step", "name") if key in progress)

    @property
    def _directory(self) -> Path:
        return (self.disk or self.bench.root / "runs") / self.name

    def _wait_for_a_moment(self, process: subprocess.Popen, same_workers: bool) -> bool:
        """Until a random moment of the work (sometimes of the start-up); False if the run has ended before."""
        if self.rng.random() > 0.2 and not same_workers:
            seen = self._progress_mark()
            while process.poll() is None and self._progress_mark() == seen:
                time.sleep(0.05)
        end = time.monotonic() + self.rng.uniform(0, SOON_SECONDS)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        return process.poll() is None

    def _progress_mark(self) -> str | None:
        try:
            return json.loads((self._directory / "progress.json").read_text())["worker"]
        except (OSError, ValueError):
            return None

    def _mend(self) -> None:
        if self.disk:
            (self.disk / "ballast").unlink(missing_ok=True)
        if self.server.process.poll() is not None:
            self.server.start()

    # -- the damages

    def _worker(self, process: subprocess.Popen) -> None:
        workers = named(process, "RayTrainWorker")
        if workers:
            self.rng.choice(workers).kill()

    def _hang(self, process: subprocess.Popen) -> None:
        workers = named(process, "RayTrainWorker")
        if workers:
            self.rng.choice(workers).suspend()

    def _raylet(self, process: subprocess.Popen) -> None:
        raylets = [p for p in children(process) if p.name() == "raylet"]
        if not raylets:
            process.kill()
            return
        raylets[0].kill()

    def _driver(self, process: subprocess.Popen) -> None:
        process.kill()

    def _sigterm(self, process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGTERM)

    def _mlflow(self, process: subprocess.Popen) -> None:
        if self.server.process.poll() is None:
            self.server.kill()
        else:
            self.server.start()

    def _disk(self, process: subprocess.Popen) -> None:
        """Fill the file system; the run fails by itself as soon as it must write."""
        with (self.disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)


def children(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def descendants(process: subprocess.Popen) -> list[int]:
    return [child.pid for child in children(process)]


def named(process: subprocess.Popen, text: str) -> list[psutil.Process]:
    """Descendants whose title contains `text` (Ray puts an actor's class there)."""
    found = []
    for child in children(process):
        try:
            if text in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found
