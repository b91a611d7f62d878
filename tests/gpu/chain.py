"""The real worker on this machine: three tasks through the command line, twice, and once ended and resumed.

Says whether the adapters of these three runs have the same bits, or how far apart they are, under ZeRO-2 and ZeRO-3.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from commands import NEEDED, Chain, Finished, at_once, finish, require
from measure import GPU, Plan
from results import Result, Table

AFTER = 3  # optimizer steps of the first task before the run is ended
STEPS = 30
RUNS = ("first", "second", "resumed")


def run(plan: Plan, result: Result) -> None:
    require(*NEEDED)
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain.make(Path(scratch), plan, 240 if plan.tiny else STEPS)
        done = result.table(
            "Runs of the chain",
            ["ZeRO", "run", "code", "seconds", "resumed at step", "training tokens/s, task by task", "says"],
            f"One process, {'NCCL' if GPU else 'gloo'}, three tasks of {chain.raw['training']['max_steps']} optimizer "
            f"steps, {at_once()} runs side by side; seconds with the start of Ray and all imports.",
        )
        apart = result.table(
            "Adapters of the same configuration",
            ["ZeRO", "task", "runs", "same bits", "largest difference", "‖difference‖ / ‖U‖"],
        )
        stages = ("zero2",) if plan.tiny else ("zero2", "zero3")
        with ThreadPoolExecutor(at_once()) as pool:
            # the longest ones first
            futures = {(stage, "resumed"): pool.submit(resumed, chain, stage, plan) for stage in stages}
            for stage, run in product(stages, RUNS[:2]):
                futures[stage, run] = pool.submit(straight, chain, stage, run, plan)
            for stage in stages:
                for run in RUNS:
                    report_run(result, done, chain, stage, run, futures[stage, run].result())
                compare(result, apart, chain, stage)


def straight(chain: Chain, stage: str, run: str, plan: Plan) -> Finished:
    return chain.run(f"{stage}-{run}", plan.left(), deepspeed=stage)


def resumed(chain: Chain, stage: str, plan: Plan) -> Finished:
    """Ended by SIGTERM in the middle of its first task, then the same command again."""
    name = f"{stage}-resumed"
    process = chain.start(name, deepspeed=stage)
    while process.poll() is None and plan.left() > 0 and chain.training_step(name) < AFTER:
        time.sleep(0.02)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGTERM)
    stopped = finish(process, plan.left())
    again = straight(chain, stage, "resumed", plan)
    return again if stopped.code else dataclasses.replace(again, remark="it was done before it could be stopped")


def report_run(result: Result, table: Table, chain: Chain, stage: str, run: str, found: Finished) -> None:
    if found.code != 0:
        result.row(table, stage, run, found.code, found.seconds, None, None, found.last_words)
        return
    steps = json.loads(found.out)["steps"]
    directory = chain.directory(f"{stage}-{run}")
    training = [json.loads((directory / step["directory"] / "metrics.json").read_text())["training"] for step in steps]
    at = [step for each in training for step in each.get("resumed_at", [])]
    pace = ", ".join(
        f"{each['tokens_per_second']:,.0f}" if each.get("tokens_per_second") else "–" for each in training
    )
    result.row(table, stage, run, found.code, found.seconds, ", ".join(map(str, at)) or None, pace, found.remark)


def compare(result: Result, table: Table, chain: Chain, stage: str) -> None:
    """Each step's adapter against that of the first run."""
    adapters = {run: adapters_of(chain.directory(f"{stage}-{run}")) for run in RUNS}
    for run in RUNS[1:]:
        for task, expected in adapters["first"].items():
            other = adapters[run].get(task)
            if other is None:
                result.row(table, stage, task, f"first, {run}", None, None, None)
                continue
            keys = [key for key in expected if key.endswith(".U")]
            ours, theirs = (torch.cat([each[key].float().flatten() for key in keys]) for each in (expected, other))
            same = all(torch.equal(expected[key], other[key]) for key in expected)
            gap = ours - theirs
            distance = (float(gap.abs().max()), float(gap.norm() / ours.norm()))
            result.row(table, stage, task, f"first, {run}", same, *distance)


def adapters_of(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Task → tensors of the adapter published after it; of a run that did not end well, as far as it came."""
    from safetensors.torch import load_file

    found = {}
    results = directory / "results.json"
    for step in json.loads(results.read_text())["steps"] if results.exists() else []:
        file = directory / step["directory"] / "adapter" / "adapter_model.safetensors"
        if file.exists():
            found[step["task"]] = load_file(file)
    return found
