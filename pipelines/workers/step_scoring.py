"""Scores the cells of a step, on a worker."""

from __future__ import annotations

import contextlib
import json
import math
import time

import torch
from torch import nn

from pipelines.data.benchmarks import LoadedBenchmark
from pipelines.data.samples import parts_of
from pipelines.distributed import engine
from pipelines.errors import DivergedError
from pipelines.evaluation.benchmarks import evaluate_benchmark
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.samples import answer
from pipelines.runs.samples import Sample
from pipelines.runs.step_record import Cell, SelfTest
from pipelines.workers.context import WorkContext
from pipelines.workers.resident_model import ResidentModel

SELF_TEST_TOKENS = 32
SELF_TEST_LOGITS = 64


class StepScoring:
    """Evaluates models on the evaluation sets of an assignment; writes predictions to the run directory."""

    def __init__(self, work: WorkContext, resident: ResidentModel):
        self.work, self.resident = work, resident

    def score(self, model: nn.Module, directory: str, names: list[str], training: bool = False) -> list[Cell]:
        """Score the named sets and write their predictions; returns the cells on rank 0, an empty list elsewhere.

        Args:
            training: the model is inside its training engine and can be called through it.

        Raises:
            DivergedError: a score is not finite.
        """
        work = self.work
        cells: list[Cell] = []
        for name in names:
            # reading and encoding may take long; only what follows is guarded
            self.resident.benchmark(name) or self.resident.evaluation_set(name)
        ready = contextlib.nullcontext() if training else engine.ready_for_inference(model, work.settings, work.world)
        with ready, work.heartbeat.guard():
            for name in names:
                cells += self._cell(model, directory, name)
        bad = [cell.name for cell in cells if not _is_finite(cell)]
        if work.world.sum(len(bad)):  # only rank 0 has the cells, but all ranks must raise
            raise DivergedError(
                f"the score of {', '.join(bad) or 'a set'} is not finite; lower training.learning_rate or "
                "training.max_grad_norm"
            )
        return cells

    def _cell(self, model: nn.Module, directory: str, name: str) -> list[Cell]:
        work, begun = self.work, time.monotonic()
        work.heartbeat.report("evaluating", directory=directory, name=name)

        def progress(done: int, count: int, share: float) -> None:
            left = (time.monotonic() - begun) * (1 - share) / share
            numbers = {"done": done, "count": count, "seconds_left": left}
            work.heartbeat.report("evaluating", directory=directory, name=name, **numbers)

        if benchmark := self.resident.benchmark(name):
            result = self._benchmark(model, benchmark, progress)
        else:
            result = evaluate(
                model,
                self.resident.evaluation_set(name),
                work.world,
                work.config.evaluation.batch_tokens,
                role="task" if name in {task.name for task in work.config.tasks} else "retention",
                key=work.assignment.cell_keys[name],
                progress=progress,
            )
        if result is None:
            return []
        cell, outcomes = result
        lines = "".join(json.dumps(outcome) + "\n" for outcome in outcomes)
        work.run.write_bytes(f"{directory}/predictions/{name}.jsonl", lines.encode())
        return [cell]

    def _benchmark(self, model: nn.Module, loaded: LoadedBenchmark, progress) -> tuple[Cell, list[dict]] | None:
        work, resident = self.work, self.resident
        return evaluate_benchmark(
            model,
            loaded,
            resident.tokenizer,
            resident.context,
            work.world,
            work.config.evaluation.batch_tokens,
            work.assignment.cell_keys[loaded.benchmark.name],
            lambda done, count: progress(done, count, done / count),
        )

    def sample(self, model: nn.Module, directory: str) -> list[Sample]:
        """Answer what the step has yet to answer of `evaluation.samples`; on rank 0, an empty list elsewhere."""
        work, questions = self.work, self.work.assignment.questions_for(directory)
        if not questions:
            return []
        parts = parts_of(questions, self.resident.tokenizer, work.config, self.resident.context)
        count = sum(len(part.questions) for part in parts)

        def progress(done: int) -> None:
            work.heartbeat.report("sampling", directory=directory, done=done, count=count)

        with engine.ready_for_inference(model, work.settings, work.world), work.heartbeat.guard():
            return answer(model, questions, parts, work.world, work.config.evaluation.batch_tokens, progress)

    def self_test(self, model: nn.Module) -> SelfTest:
        """A few logits that this worker computes, against which anyone who loads the adapter can check it."""
        work = self.work
        text = (work.config.corpora or work.config.tasks)[0]
        ids = next(iter(self.resident.evaluation_set(text.name).items)).input_ids[:SELF_TEST_TOKENS]
        with engine.ready_for_inference(model, work.settings, work.world), torch.no_grad():
            model.eval()
            batch = torch.as_tensor(ids, device=work.world.device)[None]
            logits = model(input_ids=batch, use_cache=False).logits[0, -1, :SELF_TEST_LOGITS]
        return SelfTest([int(i) for i in ids], [float(v) for v in logits])


def _is_finite(cell: Cell) -> bool:
    return all(math.isfinite(value) for value in (cell.value, cell.nll) if value is not None)
