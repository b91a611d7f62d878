"""The command line in a process of its own, over a three-task chain on a real base model and real text."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml


@dataclass(frozen=True)
class Bench:
    """A folder to run in, with a three-task configuration: classifier head, verbalizer, language modelling."""

    root: Path
    raw: dict

    def config(self, name: str, **changes) -> Path:
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.raw | {"name": name} | changes))
        return path

    def start(self, config: Path, *arguments: str, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "pipelines", "run", str(config), "--json", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.root, start_new_session=True, **(streams | options))

    def run(self, config: Path, *arguments: str, code: int = 0, timeout: int = 600) -> dict | str:
        """results.json of a run that ends well, stderr of one that does not."""
        process = self.start(config, *arguments)
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == code, err
        return json.loads(out) if code == 0 else err

    def directory(self, name: str) -> Path:
        return self.root / "runs" / name

    def metrics(self, results: dict, step: int) -> dict:
        return json.loads((self.step(results, step) / "metrics.json").read_text())

    def step(self, results: dict, step: int) -> Path:
        return self.directory(results["run"]) / results["steps"][step]["directory"]

    def adapter_bytes(self, results: dict, step: int) -> bytes:
        return (self.step(results, step) / "adapter" / "adapter_model.safetensors").read_bytes()


def all_gone(pids: Iterable[int]) -> bool:
    """Whether none of these processes runs any more; one that its new parent has not reaped yet does not run."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
    return True


def wait_for(condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 300) -> object:
    """The first true value of `condition`; fails if `process` ends before, or after so many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value
