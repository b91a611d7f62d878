r"""How a chain grows with its number of tasks: time, memory and storage of its last steps against its first ones.

    python tests/benchmarks/scale.py [--continue 2 5 15 50] [--stack 2 5 15] [--strategy sequential]

Real chains on a random Llama whose arithmetic takes next to no time: one worker under ZeRO-2, a head a task, MLflow
in sqlite. Replay keeps 48 rows, which two tasks fill. Row t of the score matrix has t scores, so evaluation and
predictions grow by their nature. "a → b" is the median of the first five steps, without the very first one, which also
warms up, and of the last five; of peak memory, which never falls, it is the first and the last step. Processor seconds
are what other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from pipelines.lineage.store import initialize  # noqa: E402
from tests.conftest import WORDS, make_model, make_tokenizer, write_reviews  # noqa: E402

HIDDEN = 128  # its narrowest layer holds 32 blocks of rank 2
STRATEGIES = {"replay": {"name": "replay", "size": 4, "memory": 48}, "sequential": {"name": "sequential"}}
PARTS = ("adapter", "heads.safetensors", "strategy", "predictions", "metrics.json")
WINDOW = 5
LOOK_SECONDS = 0.05
SEARCH_SECONDS = 2.0  # between two looks for the worker, which walk over all processes
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class Clock:
    """Processor seconds of a process by time, as samples."""

    process: psutil.Process | None = None
    times: list[float] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)

    def look(self) -> None:
        with contextlib.suppress(psutil.Error):
            used = self.process.cpu_times()
            self.times.append(time.time())
            self.spent.append(used.user + used.system)

    def between(self, begin: float, end: float) -> float:
        first, last = np.interp([begin, end], self.times, self.spent)
        return float(last - first)


@dataclass(frozen=True)
class Chain:
    """A finished chain: `metrics.json` and bytes by part of each step, in their order, and what it took as a whole."""

    metrics: list[dict]
    bytes: list[dict[str, int]]
    events: int  # bytes
    database: int  # bytes beyond an empty one
    artifacts: int  # bytes
    wall: float  # seconds
    driver: float  # processor seconds of the driver's process
    worker: Clock

    def __len__(self) -> int:
        return len(self.metrics)


def write_inputs(folder: Path, tasks: int) -> None:
    """Base model and tasks; the words that end a task's rows are its own."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    make_model(tokenizer, HIDDEN).save_pretrained(folder / "base")
    endings = itertools.islice(itertools.product(WORDS, repeat=2), tasks)
    for number, words in enumerate(endings):
        write_reviews(folder / f"task{number:02d}", " " + " ".join(words))


def write_config(folder: Path, root: Path, tasks: int, carry: str, strategy: str) -> Path:
    task = {"kind": "classification", "text": "sentence"}
    config = {
        "name": "scale",
        "base_model": {"path": str(folder / "base"), "dtype": "float32"},
        "storage": str(root),
        "adapter": {"type": "curlora", "r": 2, "carry": carry},
        "strategy": STRATEGIES[strategy],
        "training": {"max_steps": 12, "batch_size": 8, "max_length": 32},
        "resources": {"workers": 1},
        "deepspeed": "zero2",
        "tasks": [task | {"name": f"task{k:02d}", "data": str(folder / f"task{k:02d}")} for k in range(tasks)],
        "tracking": {"uri": f"sqlite:///{root}/mlflow.db"},
    }
    path = root / "scale.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_chain(config: Path, cache: str) -> tuple[dict, float, Clock, Clock]:
    """(results, seconds on the wall, processor seconds of the driver and of the worker)."""
    begun = time.time()
    command = [sys.executable, "-m", "pipelines", "run", str(config), "--json"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
        environment = os.environ | ENVIRONMENT | {"CURLORA_CACHE": cache}
        driver = Clock(psutil.Popen(command, stdout=out, stderr=told, env=environment, cwd=config.parent))
        worker = Clock()
        while driver.process.poll() is None:
            driver.look()
            worker.process = worker.process or find_worker(driver.process)
            if worker.process:
                worker.look()
            time.sleep(LOOK_SECONDS if worker.process else SEARCH_SECONDS)
        for stream in (out, told):
            stream.seek(0)
        if driver.process.returncode:
            raise SystemExit(f"the chain failed:\n{told.read()}")
        return json.load(out), time.time() - begun, driver, worker


def find_worker(driver: psutil.Process) -> psutil.Process | None:
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == ["ray::RayTrainWorker"]:
                return process
    return None


def measure(folder: Path, tasks: int, carry: str, strategy: str) -> Chain:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch)
        config = write_config(folder, root, tasks, carry, strategy)
        database = root / "mlflow.db"
        initialize(f"sqlite:///{database}")
        empty = database.stat().st_size
        results, wall, driver, worker = run_chain(config, str(folder / "cache"))
        steps = [root / "scale" / step["directory"] for step in results["steps"]]
        print(f"{tasks} tasks, {carry}, {strategy}: {wall:.0f} s, {results['seconds']}", file=sys.stderr)
        return Chain(
            metrics=[json.loads((step / "metrics.json").read_text()) for step in steps],
            bytes=[{part: size_of(step / part) for part in PARTS} for step in steps],
            events=size_of(root / "scale" / "events"),
            database=database.stat().st_size - empty,
            artifacts=size_of(root / "mlruns"),
            wall=wall,
            driver=driver.spent[-1],
            worker=worker,
        )


def size_of(path: Path) -> int:
    """Bytes of a file or of everything in a folder; 0 if it is not there."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# -- tables


def optimizer_step(metrics: dict) -> float:
    """Median milliseconds from one optimizer step to the next."""
    moments = [moment for *_, moment in metrics["training"]["curve"]]
    return 1e3 * statistics.median(after - before for before, after in itertools.pairwise(moments))


def beside_scores(chain: Chain) -> list[float]:
    """Processor seconds of the worker from the end of one step to that of the next, without those of its scores."""
    seconds = []
    for before, step in itertools.pairwise(chain.metrics):
        scores = step["cells"]
        scoring = chain.worker.between(scores[0]["time"] - scores[0]["seconds"], scores[-1]["time"])
        seconds.append(chain.worker.between(before["finished"], step["finished"]) - scoring)
    return seconds


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Median of the first and of the last steps, the very first one left out where there are more than two."""
    values = values[1:] if len(values) > 2 else values
    window = min(WINDOW, max(len(values) // 2, 1))
    return statistics.median(values[:window]), statistics.median(values[-window:])


def shown(values: Sequence[float], form: str = ",.0f") -> str:
    first, last = ends(values)
    return f"{first:{form}} → {last:{form}}"


def ratio(values: Sequence[float]) -> str:
    first, last = ends(values)
    return f"{shown(values, '.2f')} ({last / first:.2f})"


TIME: dict[str, Callable[[Chain], str]] = {
    "worker beside scores, processor s": lambda c: ratio(beside_scores(c)),
    "an optimizer step, ms": lambda c: ratio([optimizer_step(m) for m in c.metrics]),
    "training, s": lambda c: ratio([m["seconds"]["train"] for m in c.metrics]),
    "overhead, s": lambda c: ratio([m["seconds"]["overhead"] for m in c.metrics]),
    "a score, ms": lambda c: shown([1e3 * m["seconds"]["evaluate"] / len(m["cells"]) for m in c.metrics]),
    "worker's peak memory, MB": lambda c: f"{peak(c, 0):.0f} → {peak(c, -1):.0f}",
    "driver, processor s": lambda c: f"{c.driver:.1f}",
    "whole chain, s": lambda c: f"{c.wall:.0f}",
}
STORAGE: dict[str, Callable[[Chain], str]] = {
    **{part: lambda c, part=part: shown([sizes[part] for sizes in c.bytes]) for part in PARTS},
    "events, a step": lambda c: f"{c.events / len(c):,.0f}",
    "MLflow database, a step": lambda c: f"{c.database / len(c):,.0f}",
    "MLflow artifacts, a step": lambda c: f"{c.artifacts / len(c):,.0f}",
}


def peak(chain: Chain, step: int) -> float:
    return chain.metrics[step]["peak_memory_bytes"] / 1e6


def print_table(title: str, chains: Sequence[Chain], rows: dict[str, Callable[[Chain], str]]) -> None:
    print(f"\n| {title} | " + " | ".join(f"{len(chain)} tasks" for chain in chains) + " |")
    print("|---" * (len(chains) + 1) + "|")
    for name, value in rows.items():
        print(f"| {name} | " + " | ".join(value(chain) for chain in chains) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--continue", nargs="*", type=int, default=[2, 5, 15, 50], metavar="TASKS", dest="continued")
    parser.add_argument("--stack", nargs="*", type=int, default=[2, 5, 15], metavar="TASKS", help="at most 32")
    parser.add_argument("--strategy", choices=STRATEGIES, default="replay")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, max([*arguments.continued, *arguments.stack]))
        for carry, counts in (("continue", arguments.continued), ("stack", arguments.stack)):
            if counts:
                chains = [measure(folder, count, carry, arguments.strategy) for count in counts]
                print_table(f"`carry: {carry}`, {arguments.strategy}: time and memory", chains, TIME)
                print_table("bytes", chains, STORAGE)


if __name__ == "__main__":
    main()
