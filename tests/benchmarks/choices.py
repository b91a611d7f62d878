r"""Scoring a classification by label texts: the prompt once for all its labels against once for each.

Both ways in turn, in one process, on one core. Run by hand:

    python tests/benchmarks/choices.py --model ../shared/models/tiny-llama --data ../shared/data/dbpedia
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers

from pipelines.config.loading import parse_config
from pipelines.data.sets import evaluation_set
from pipelines.distributed.world import World
from pipelines.evaluation.batching import make_batches, make_question_batches
from pipelines.evaluation.scorers import by_choice, by_likelihood

ROUNDS = 3
BATCH_TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = {"name": "task", "kind": "classification", "head": "verbalizer", "data": arguments.data}
    task["prompt"] = "{text}\nThis is about a:"
    config = parse_config(
        {
            "name": "choices",
            "base_model": {"path": arguments.model, "dtype": "float32"},
            "tasks": [task],
            "training": {"max_length": 128},
            "evaluation": {"max_examples": arguments.rows},
        }
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    found = evaluation_set(config.tasks[0], tokenizer, config, model.config.max_position_embeddings)
    world = World(0, 1, torch.device("cpu"))
    ways = {
        "once for each label": (by_likelihood, make_batches(found.items, BATCH_TOKENS)),
        "once for all labels": (by_choice, make_question_batches(found.items, BATCH_TOKENS)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, (run, batches) in ways.items():
                begun = time.perf_counter()
                scored = [entry for batch in batches for entry in run(model, found, batch, world)]
                seconds[name].append(time.perf_counter() - begun)
                scores[name] = {(entry.example, entry.choice): entry.nll for entry in scored}
    each, once = scores.values()
    print(f"{len(found.class_names)} labels, {len(found.labels)} rows")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times):.2f} s |")
    first, second = (statistics.median(times) for times in seconds.values())
    print(
        f"ratio {first / second:.1f}; largest relative difference of an NLL "
        f"{max(abs(once[key] / each[key] - 1) for key in each):.1e}"
    )


if __name__ == "__main__":
    main()
