"""Score a model on encoded sets: accuracy or macro-F1, and negative log-likelihood with perplexity.

Sharded so that each example counts exactly once whatever the number of workers: batches are cut from the globally
sorted sequences (their content does not depend on the world size), dealt out in turn, and the per-example outcomes
are gathered on rank 0. Under ZeRO-3 every rank runs the same number of forward passes, because each one is a
collective operation.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines import metrics
from pipelines.data import EvaluationItem, EvaluationSet, majority_rate
from pipelines.heads import causal_lm, get_head


@dataclass(frozen=True)
class World:
    """Where this process stands among the workers.

    Attributes:
        rank, size: as in torch.distributed.
        device: where the model runs.
        lockstep: every rank must run equally many forward passes (ZeRO-3).
        group: a gloo group for gathering Python objects; None for one process.
    """

    rank: int
    size: int
    device: torch.device
    lockstep: bool = False
    group: Any = None


@dataclass(frozen=True)
class Cell:
    """One cell of the score matrix, or one retention figure. `nll` is nats a token; `value` is what `metric` says."""

    name: str
    role: str
    metric: str
    value: float
    nll: float | None
    perplexity: float | None
    count: int
    tokens: int | None
    majority: float | None
    digest: str
    key: str
    seconds: float
    time: float

    def to_json(self) -> dict:
        return asdict(self)


def make_batches(items: Sequence[EvaluationItem], batch_tokens: int) -> list[list[EvaluationItem]]:
    """Longest first, as many sequences a batch as `batch_tokens` padded tokens hold (at least one)."""
    ordered = sorted(items, key=lambda item: (-len(item.input_ids), item.example, item.choice))
    batches: list[list[EvaluationItem]] = []
    for item in ordered:
        if batches and len(batches[-1][0].input_ids) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def evaluate(
    model: nn.Module, evaluation: EvaluationSet, world: World, batch_tokens: int, role: str, key: str
) -> tuple[Cell, list[dict]] | None:
    """Score `evaluation`; (cell, outcomes in order of example) on rank 0, None on the others.

    An outcome is `{"id", "label", "prediction", "correct"}`, or `{"id", "nll", "tokens"}` for text.
    """
    begin = time.perf_counter()
    batches = make_batches(evaluation.items, batch_tokens)
    was_training = model.training
    model.eval()
    local: list[tuple[int, int, float, int]] = []
    with torch.no_grad():
        for number in range(0, len(batches), world.size):
            mine = number + world.rank
            if mine < len(batches):
                local += _score(model, evaluation, batches[mine], world.device)
            elif world.lockstep:
                _score(model, evaluation, batches[-1], world.device)
    model.train(was_training)
    rows = gather(local, world)
    if rows is None:
        return None
    outcomes = _outcomes(evaluation, rows)
    cell = _cell(evaluation, outcomes, rows, role, key, time.perf_counter() - begin)
    return cell, outcomes


def gather(local: list, world: World) -> list | None:
    """All ranks' lists joined, on rank 0; None elsewhere."""
    if world.size == 1:
        return local
    parts: list | None = [None] * world.size if world.rank == 0 else None
    torch.distributed.gather_object(local, parts, dst=0, group=world.group)
    return [entry for part in parts for entry in part] if parts is not None else None


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, length) token ids padded at the right with 0, and the attention mask that hides the padding."""
    length = max(map(len, sequences))
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def keep_logits(model: nn.Module, positions: torch.Tensor | int) -> dict:
    """`logits_to_keep` for models that know it: logits where nobody looks cost more than all else in a small model."""
    parameters = inspect.signature(causal_lm(model).forward).parameters
    return {"logits_to_keep": positions} if "logits_to_keep" in parameters else {}


def last_token_features(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, hidden): the last *real* token of each right-padded sequence."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]


def _score(model, evaluation: EvaluationSet, batch: list[EvaluationItem], device) -> list[tuple[int, int, float, int]]:
    """(example, choice or prediction, summed NLL, tokens) of each sequence of a batch."""
    ids, mask = pad([item.input_ids for item in batch], device)
    if evaluation.kind == "classifier":
        output = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **keep_logits(model, 1)
        )
        features = last_token_features(output.hidden_states[-1], mask)
        head = get_head(model, evaluation.name)
        predictions = head(features.to(head.weight.dtype)).argmax(-1).tolist()
        return [(item.example, p, 0.0, 0) for item, p in zip(batch, predictions, strict=True)]
    nll = _sequence_nll(model, ids, mask, [item.start for item in batch])
    return [
        (item.example, item.choice, value, len(item.input_ids) - item.start)
        for item, value in zip(batch, nll, strict=True)
    ]


def _sequence_nll(model, ids: torch.Tensor, mask: torch.Tensor, starts: Sequence[int]) -> list[float]:
    """Summed NLL of the tokens from `starts` on. The logits before the first such token are never computed."""
    first = min(starts) - 1
    positions = torch.arange(first, ids.shape[1] - 1, device=ids.device)
    keep = keep_logits(model, positions)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
    if not keep:
        logits = logits[:, positions]
    targets = ids[:, first + 1 :]
    losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    counted = mask[:, first + 1 :].bool()
    counted &= positions[None, :] + 1 >= torch.tensor(starts, device=ids.device)[:, None]
    return (losses.double() * counted).sum(1).tolist()


def _outcomes(evaluation: EvaluationSet, rows: list[tuple[int, int, float, int]]) -> list[dict]:
    rows = sorted(rows)
    ids = evaluation.row_numbers
    if evaluation.kind == "text":
        return [{"id": ids[example], "nll": nll, "tokens": tokens} for example, _, nll, tokens in rows]
    if evaluation.kind == "classifier":
        predicted = {example: prediction for example, prediction, _, _ in rows}
    else:
        best: dict[int, tuple[float, int]] = {}
        for example, choice, nll, _ in rows:
            best[example] = min(best.get(example, (math.inf, -1)), (nll, choice))
        predicted = {example: choice for example, (_, choice) in best.items()}
    return [
        {"id": ids[i], "label": y, "prediction": predicted[i], "correct": predicted[i] == y}
        for i, y in enumerate(evaluation.labels)
    ]


def _cell(evaluation: EvaluationSet, outcomes: list[dict], rows: list, role: str, key: str, seconds: float) -> Cell:
    nll = tokens = None
    if evaluation.kind == "text":
        tokens = sum(outcome["tokens"] for outcome in outcomes)
        nll = value = math.fsum(outcome["nll"] for outcome in outcomes) / tokens
    else:
        score = metrics.accuracy if evaluation.metric == "accuracy" else metrics.macro_f1
        value = score([o["prediction"] for o in outcomes], [o["label"] for o in outcomes])
    return Cell(
        name=evaluation.name,
        role=role,
        metric=evaluation.metric,
        value=value,
        nll=nll,
        perplexity=metrics.perplexity(nll),
        count=len(outcomes),
        tokens=tokens,
        majority=majority_rate(evaluation.labels),
        digest=evaluation.digest,
        key=key,
        seconds=seconds,
        time=time.time(),
    )
