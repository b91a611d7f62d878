r"""Where the fixed cost of a chain goes: seconds from the command to the first optimizer step, by process, and the
seconds of each step that are neither training nor evaluation.

Four short text tasks in one segment. Run by hand, on an idle machine:

    python tests/benchmarks/startup.py --model ../shared/models/tiny-llama \
        --data ../shared/data/domain_biomed_pubmedqa
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

TASKS = ("first", "second", "third", "fourth")
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Process:
    name: str
    born: float  # seconds after the command
    spent: float  # processor seconds until the first optimizer step


def write_config(model: str, data: str, root: Path, workers: int) -> Path:
    task = {"kind": "language-modeling", "data": data, "documents": "joined"}
    config = {
        "name": "startup",
        "base_model": {"path": model, "dtype": "float32"},
        "storage": str(root),
        "training": {"max_steps": 10, "batch_size": 16, "max_length": 128},
        "resources": {"workers": workers},
        "evaluation": {"max_examples": 20},
        "tasks": [task | {"name": name} for name in TASKS],
        "tracking": {"uri": f"sqlite:///{root}/mlflow.db"},
    }
    path = root / "startup.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def title(process: psutil.Process) -> str:
    words = process.cmdline()
    if words[:1] and words[0].startswith("ray::"):
        return " ".join(words)[:40]
    names = [Path(word).name for word in words if word.endswith(".py") or "/" in word or word == "pipelines"]
    return next((n for n in names if not n.startswith("python")), process.name())[:40]


def measure(config: Path, root: Path) -> tuple[dict[str, float], list[Process], float, dict]:
    """(seconds to the first sight of each phase, processes until training, seconds in all, results)."""
    begun = time.time()
    command = [sys.executable, "-m", "pipelines", "run", str(config), "--json"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    spent: dict[int, Process] = {}
    progress, phases = root / "startup" / "progress.json", {}
    while "training" not in phases:
        time.sleep(LOOK_SECONDS)
        everyone = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        for process in everyone:
            try:
                times = process.cpu_times()
                born = process.create_time() - begun
                spent[process.pid] = Process(title(process), born, times.user + times.system)
            except psutil.Error:
                continue
        kind = json.loads(progress.read_text())["kind"] if progress.exists() else "before the workers"
        phases.setdefault(kind, time.time() - begun)
    out, _ = driver.communicate()
    return phases, list(spent.values()), time.time() - begun, json.loads(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = write_config(arguments.model, arguments.data, root, arguments.workers)
        phases, processes, total, results = measure(config, root)
        print("seconds until", ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items()))
        print(f"the whole chain: {total:.1f} s, of which", results["seconds"], "\n")
        print("| process | started at, s | processor seconds until training |\n|---|---|---|")
        for process in sorted(processes, key=lambda process: process.born):
            if process.spent >= 0.3:
                print(f"| {process.name} | {process.born:.1f} | {process.spent:.1f} |")
        print(f"| all {len(processes)} | | {sum(process.spent for process in processes):.1f} |\n")
        overheads = []
        for step in results["steps"]:
            metrics = json.loads((root / "startup" / step["directory"] / "metrics.json").read_text())
            overheads.append(metrics["seconds"]["overhead"])
        print("seconds beyond training and evaluation, step by step:", ", ".join(f"{s:.2f}" for s in overheads))
        print(f"median of the later steps: {statistics.median(overheads[1:]):.2f} s")


if __name__ == "__main__":
    main()
