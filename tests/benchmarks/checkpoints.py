r"""What checkpoints in the middle of a step cost: bytes and seconds, against the time of an optimizer step.

One text task, two workers, ZeRO-2, a checkpoint at every look (about once a second), under a strategy without state
and under two with state. Seconds are those that all workers stand still. Run by hand:

    python tests/benchmarks/checkpoints.py --model ../shared/models/tiny-llama \
        --data ../shared/data/domain_biomed_pubmedqa
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

INTERVAL = 30.0  # durability.checkpoint_seconds by default


def measure(model: str, data: str, strategy: str, root: Path) -> dict:
    """Medians over the checkpoints of the second of two tasks (a strategy's state is full then)."""
    task = {"kind": "language-modeling", "data": data, "documents": "joined"}
    config = {
        "name": strategy,
        "base_model": {"path": model, "dtype": "float32"},
        "storage": str(root),
        "strategy": {"name": strategy},
        "training": {"max_steps": 40, "batch_size": 16, "max_length": 128},
        "durability": {"checkpoint_seconds": 0},
        "evaluation": {"max_examples": 20},
        "tasks": [task | {"name": "first"}, task | {"name": "second"}],
        "tracking": None,
    }
    (root / f"{strategy}.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "pipelines", "run", str(root / f"{strategy}.yaml"), "--json"]
    results = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    run = root / strategy
    events = [json.loads(path.read_text()) for path in (run / "events").glob("*.json")]
    kept = [event for event in events if event["kind"] == "checkpoint" and event["position"] == 2]
    metrics = json.loads((run / results["steps"][1]["directory"] / "metrics.json").read_text())
    spent = sum(event["seconds"] for event in kept)
    step = (metrics["training"]["tokens"] / metrics["training"]["tokens_per_second"] - spent) / 40
    seconds = statistics.median(event["seconds"] for event in kept)
    return {
        "checkpoints": len(kept),
        "kilobytes": statistics.median(event["bytes"] for event in kept) / 1000,
        "seconds": seconds,
        "steps": seconds / step,
        "share": seconds / (INTERVAL + seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    print("| strategy | checkpoint, kB | seconds | optimizer steps | share of the time at one every 30 s |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for strategy in ("sequential", "replay", "ilora"):
            m = measure(
                str(Path(arguments.model).resolve()), str(Path(arguments.data).resolve()), strategy, Path(root)
            )
            cells = (f"{m['kilobytes']:.0f}", f"{m['seconds']:.3f}", f"{m['steps']:.2f}", f"{m['share']:.2%}")
            print(f"| {strategy} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
