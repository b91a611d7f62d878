"""A three-task chain on a real base model and real text: by the command line in a process of its own, or on workers
that stay warm from test to test, where a start is not what is tested."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

SHARE = 0.1  # of a core that Ray reserves for each warm worker, so that groups of one and of two fit side by side


class WarmWorkers:
    """Worker groups on one Ray cluster in this process, by number of workers and DeepSpeed stage; started when needed.

    The stage counts because workers that have trained under ZeRO-3 cannot train under ZeRO-2 afterwards.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._groups: dict = {}

    def group(self, config):
        """The group for a configuration."""
        from pipelines.workers.group import WorkerGroup
        from pipelines.workers.ray_cluster import gpus_per_worker

        self.connect()
        key = f"{config.resources.workers}-{config.deepspeed}"
        if key not in self._groups:
            resources = config.resources.model_copy(update={"cpus_per_worker": SHARE})
            config = config.model_copy(update={"resources": resources})
            self._groups[key] = WorkerGroup(config, f"{self.folder}/{key}", gpus_per_worker(config))
        return self._groups[key]

    def connect(self) -> None:
        """A Ray cluster for this process, if it has none."""
        import ray

        from pipelines.workers.ray_cluster import connect

        if not ray.is_initialized():
            connect()

    def close(self) -> None:
        import ray

        for group in self._groups.values():
            group.close()
        ray.shutdown()


@dataclass(frozen=True)
class Bench:
    """A folder to run in, with a three-task configuration: classifier head, verbalizer, language modelling."""

    root: Path
    raw: dict
    warm: WarmWorkers = field(repr=False)

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

    def run_warm(self, config: Path, *overrides: str, **options) -> dict:
        """results.json of a run on workers that are there already; `options` are those of `run_chain`."""
        from pipelines.chain.driver import run_chain
        from pipelines.config.loading import load_config

        found = load_config(config, overrides)
        results = run_chain(found, group=self.warm.group(found), **options).to_json()
        return json.loads(json.dumps(results))

    def command(self, *arguments: str, code: int = 0) -> str:
        """stdout of a `curlora` command that ends well, stderr of one that does not, in this process."""
        from click.testing import CliRunner

        from pipelines.cli.app import main

        before = Path.cwd()
        os.chdir(self.root)
        try:
            done = CliRunner().invoke(main, arguments)
        finally:
            os.chdir(before)
        assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
        return done.stdout if code == 0 else done.stderr

    def directory(self, name: str) -> Path:
        return self.root / "runs" / name

    def metrics(self, results: dict, step: int) -> dict:
        return json.loads((self.step(results, step) / "metrics.json").read_text())

    def step(self, results: dict, step: int) -> Path:
        return self.directory(results["run"]) / results["steps"][step]["directory"]

    def samples(self, results: dict) -> list[list[dict]]:
        """The sample answers of row 0 and of every step, as recorded."""
        base = next((self.directory(results["run"]) / "steps").glob("0-*/metrics.json"))
        records = [
            json.loads(base.read_text()),
            *(self.metrics(results, step) for step in range(len(results["steps"]))),
        ]
        return [record["samples"] for record in records]

    def adapter_bytes(self, results: dict, step: int) -> bytes:
        return (self.step(results, step) / "adapter" / "adapter_model.safetensors").read_bytes()


def answered_alone(run: Path, step: str) -> list[dict]:
    """The sample answers of a run's model after a step (`base`: before any), by one process without Ray."""
    import torch

    from pipelines.data.samples import parts_of, questions_of
    from pipelines.distributed.world import World
    from pipelines.evaluation.samples import answer
    from pipelines.inference.predict import load_trained
    from pipelines.runs.directory import RunDirectory

    trained = load_trained(RunDirectory(str(run)), step)
    heads = {task.name for task in trained.config.tasks if getattr(task, "head", None) == "classifier"}
    asked = [q for q in questions_of(trained.config) if q.task not in heads - trained.tasks]
    parts = parts_of(asked, trained.tokenizer, trained.config, trained.context)
    found = answer(trained.model, asked, parts, World(0, 1, torch.device("cpu")), 8192)
    return [sample.to_json() for sample in found]


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
