"""Peak memory of preparing data: a JSONL of 300 MB against one of 3 MB, each in a process of its own.

Preparing = what a run does before training: the door, digests, and the tokenised training set. Run by hand:

    python tests/benchmarks/data_memory.py --model ../shared/models/tiny-llama [--megabytes 300]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("the", "of", "a", "film", "story", "review", "plot", "price", "market", "cell", "protein", "value", "returns")


def write_rows(path: Path, megabytes: float) -> None:
    """Rows of some 600 bytes: a text and one of two labels."""
    generator, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            text = " ".join(generator.choices(WORDS, k=110)) + f" {generator.random()}"
            written += file.write(json.dumps({"text": text, "label": generator.randrange(2)}) + "\n")


def prepare(model: str, folder: str) -> None:
    """In the measured process: everything that a run does with its data before it trains."""
    import transformers

    from pipelines.config.loading import parse_config
    from pipelines.data.sets import training_examples
    from pipelines.preflight.data import check_data

    task = {"name": "rows", "kind": "classification", "data": folder}
    config = parse_config({"name": "memory", "base_model": {"path": model, "dtype": "float32"}, "tasks": [task]})
    problems = check_data(config)
    assert not problems, problems
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    examples = training_examples(config.tasks, tokenizer, 128, None, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"examples": len(examples), "peak_mib": peak}))


def measure(model: str, megabytes: float) -> dict:
    """Peak memory in MiB, examples and seconds of preparing so much data in a new process with an empty cache."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "rows"
        folder.mkdir()
        write_rows(folder / "train.jsonl", megabytes)
        write_rows(folder / "test.jsonl", 0.1)
        environment = os.environ | {"CURLORA_CACHE": scratch, "HF_DATASETS_CACHE": f"{scratch}/datasets"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(Path(__file__).parents[2])}
        begun = time.time()
        command = [sys.executable, __file__, "--model", model, "--prepare", str(folder)]
        out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        return json.loads(out.splitlines()[-1]) | {"megabytes": megabytes, "seconds": time.time() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder with a tokenizer and a config.json")
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.model, arguments.prepare)
        return
    small, large = measure(arguments.model, 3), measure(arguments.model, arguments.megabytes)
    for found in (small, large):
        print(
            "{megabytes:6.0f} MB: {examples:8,} examples, peak {peak_mib:7.1f} MiB, {seconds:6.1f} s".format(**found)
        )
    print(f"difference: {large['peak_mib'] - small['peak_mib']:.1f} MiB")


if __name__ == "__main__":
    main()
