"""Score a model on encoded sets, whatever their kind: by a head, by likelihood, or by what it writes.

Sharded so that each example counts exactly once whatever the number of workers: batches are cut from the globally
sorted sequences (their content does not depend on the world size), dealt out in turn, and the per-example outcomes
are gathered on rank 0. Under ZeRO-3 every rank runs the same number of forward passes, because each one is a
collective operation. What the scores of sequences mean is the kind's business (pipelines/kinds).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from pipelines import metrics
from pipelines.data import IGNORE, majority_rate
from pipelines.encode import Encoded
from pipelines.heads import get_head
from pipelines.kinds import KINDS, EvaluationSet, Scored
from pipelines.likelihood import accepts, keep_logits, last_hidden, next_token_losses, place, token_nll


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
    """One cell of the score matrix, or one retention figure. `nll` is nats a token; `value` is what `metric` says;
    `extras` are other metrics of the same outcomes; `loss` is the cross-entropy of the right class, where there are
    classes."""

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
    higher_is_better: bool = True
    extras: dict[str, float] = field(default_factory=dict)
    loss: float | None = None

    def to_json(self) -> dict:
        return asdict(self)


def make_batches(items: Sequence[Encoded], batch_tokens: int, new_tokens: int = 0) -> list[list[Encoded]]:
    """Longest first, as many sequences a batch as `batch_tokens` padded tokens hold (at least one).

    Args:
        new_tokens: how many more each sequence will grow by.
    """
    ordered = sorted(items, key=lambda item: (-len(item.input_ids), item.example, item.choice))
    batches: list[list[Encoded]] = []
    for item in ordered:
        if batches and (len(batches[-1][0].input_ids) + new_tokens) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def make_question_batches(items: Sequence[Encoded], batch_tokens: int) -> list[list[Encoded]]:
    """As `make_batches`, but all alternatives of an example stay together, in their order."""
    questions: dict[int, list[Encoded]] = {}
    for item in sorted(items, key=lambda item: (item.example, item.choice)):
        questions.setdefault(item.example, []).append(item)
    length = {example: max(len(item.input_ids) for item in group) for example, group in questions.items()}
    batches: list[list[Encoded]] = []
    longest = 0  # of the last batch
    for example in sorted(questions, key=lambda example: (-length[example], example)):
        group = questions[example]
        if batches and longest * (len(batches[-1]) + len(group)) <= batch_tokens:
            batches[-1].extend(group)
        else:
            batches.append(list(group))
            longest = length[example]
    return batches


def evaluate(
    model: nn.Module, evaluation: EvaluationSet, world: World, batch_tokens: int, role: str, key: str
) -> tuple[Cell, list[dict]] | None:
    """Score `evaluation`; (cell, outcomes in order of example) on rank 0, None on the others.

    An outcome is `{"id", "label", "prediction", "correct"}`; of generation `{"id", "reference", "prediction",
    "correct", "score", …}`; of text `{"id", "nll", "tokens"}`, summed over the tokens.
    """
    begin = time.perf_counter()
    scored = score(model, evaluation, world, batch_tokens)
    if scored is None:
        return None
    kind = KINDS[evaluation.kind]
    outcomes = kind.outcomes(evaluation, scored)
    summary = kind.summary(evaluation, outcomes)
    cell = Cell(
        name=evaluation.name,
        role=role,
        metric=evaluation.metric,
        value=summary.value,
        nll=summary.nll,
        perplexity=metrics.perplexity(summary.nll),
        count=len(outcomes),
        tokens=summary.tokens,
        majority=majority_rate(evaluation.labels),
        digest=evaluation.digest,
        key=key,
        seconds=time.perf_counter() - begin,
        time=time.time(),
        higher_is_better=metrics.higher_is_better(evaluation.metric),
        extras=summary.extras,
        loss=kind.loss(evaluation, scored),
    )
    return cell, outcomes


def score(model: nn.Module, evaluation: EvaluationSet, world: World, batch_tokens: int) -> list[Scored] | None:
    """What the model says of every sequence, in no order, on rank 0; None on the others."""
    return gather(score_part(model, evaluation, world, batch_tokens), world)


def score_part(model: nn.Module, evaluation: EvaluationSet, world: World, batch_tokens: int) -> list[Scored]:
    """What the model says of this rank's share of the sequences."""
    scorer = KINDS[evaluation.kind].scorer
    if scorer == "choices":
        batches = make_question_batches(evaluation.items, batch_tokens)
    else:
        batches = make_batches(evaluation.items, batch_tokens, evaluation.max_new_tokens)
    run = SCORERS[scorer]
    was_training = model.training
    model.eval()
    local: list[Scored] = []
    with torch.no_grad():
        for number in range(0, len(batches), world.size):
            mine = number + world.rank
            if mine < len(batches):
                local += run(model, evaluation, batches[mine], world)
            elif world.lockstep:
                run(model, evaluation, batches[-1], world)
    model.train(was_training)
    return local


def gather(local: list, world: World) -> list | None:
    """All ranks' lists joined, on rank 0; None elsewhere."""
    if world.size == 1:
        return local
    parts: list | None = [None] * world.size if world.rank == 0 else None
    torch.distributed.gather_object(local, parts, dst=0, group=world.group)
    return [entry for part in parts for entry in part] if parts is not None else None


# -- batches of unequal length


class Padded(NamedTuple):
    """A batch as tensors, each (batch, length): token ids, 1 where a token is real, and its position."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


def pad(sequences: Sequence[Sequence[int]], device: torch.device, side: Literal["left", "right"] = "right") -> Padded:
    """Token ids filled up with 0, whatever the tokenizer's pad token is (it may have none): the mask hides them."""
    length = max(map(len, sequences))
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        real = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, real] = sequence
        mask[row, real] = 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return Padded(*(torch.from_numpy(array).to(device) for array in (ids, mask, positions)))


def last_token_features(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, hidden): the last *real* token of each sequence, padded on either side."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


# -- scorers: a batch of sequences to `Scored`


def by_head(model: nn.Module, evaluation: EvaluationSet, batch: list[Encoded], world: World) -> list[Scored]:
    """The class that the task's head chooses for each sequence."""
    padded = pad([item.input_ids for item in batch], world.device)
    hidden, _ = last_hidden(model, input_ids=padded.ids, attention_mask=padded.mask, **keep_logits(model, 1))
    features = last_token_features(hidden, padded.mask)
    head = get_head(model, evaluation.name)
    scores = head(features.to(head.weight.dtype)).float()
    found = zip(batch, scores.argmax(-1).tolist(), (-scores.log_softmax(-1)).tolist(), strict=True)
    return [Scored(item.example, chosen, losses=tuple(losses)) for item, chosen, losses in found]


def by_likelihood(model: nn.Module, evaluation: EvaluationSet, batch: list[Encoded], world: World) -> list[Scored]:
    """Summed NLL of each sequence's tokens from `start` on."""
    padded = pad([item.input_ids for item in batch], world.device)
    sums = sequence_nll(model, padded, [item.start for item in batch])
    return [
        Scored(item.example, item.choice, value, len(item.input_ids) - item.start)
        for item, value in zip(batch, sums, strict=True)
    ]


def by_choice(model: nn.Module, evaluation: EvaluationSet, batch: list[Encoded], world: World) -> list[Scored]:
    """Summed NLL of each alternative after its prompt, which all alternatives of an example share and which runs once.

    Under ZeRO-3 every batch takes the same two passes, whatever the lengths.
    """
    if not accepts(model, "past_key_values") or any(item.start < 1 for item in evaluation.items):
        return by_likelihood(model, evaluation, batch, world)
    questions = [list(group) for _, group in itertools.groupby(batch, key=lambda item: item.example)]
    prompts = pad([group[0].input_ids[: group[0].start] for group in questions], world.device, side="left")
    seen = model(
        input_ids=prompts.ids,
        attention_mask=prompts.mask,
        use_cache=True,
        **place(model, prompts.positions),
        **keep_logits(model, 1),
    )
    cache = seen.past_key_values
    if not all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None])):
        return by_likelihood(model, evaluation, batch, world)  # a state that is no list of keys and values
    owners = [number for number, group in enumerate(questions) for _ in group]
    owner = torch.tensor(owners, device=world.device)
    answers = pad([item.input_ids[item.start :] for item in batch], world.device)
    sums = token_nll(seen.logits[owner, -1:], answers.ids[:, :1]).double().sum(1)
    later = answers.ids.shape[1] - 1
    if later or world.lockstep:
        cache.batch_select_indices(owner)
        given = answers.ids[:, : max(later, 1)]
        positions = prompts.positions[owner, -1:] + 1 + torch.arange(given.shape[1], device=world.device)
        logits = model(
            input_ids=given,
            attention_mask=torch.cat([prompts.mask[owner], answers.mask[:, : given.shape[1]]], 1),
            past_key_values=cache,
            use_cache=True,
            **place(model, positions),
        ).logits
        if later:
            sums += (token_nll(logits, answers.ids[:, 1:]).double() * answers.mask[:, 1:]).sum(1)
    return [
        Scored(item.example, item.choice, value, len(item.input_ids) - item.start)
        for item, value in zip(batch, sums.tolist(), strict=True)
    ]


def sequence_nll(model: nn.Module, padded: Padded, starts: Sequence[int]) -> list[float]:
    """Summed NLL of each row's tokens from `starts` on (≥ 1, counted without padding, on whichever side that is)."""
    counted = padded.mask.bool() & (padded.positions >= torch.tensor(starts, device=padded.ids.device)[:, None])
    targets = torch.where(counted, padded.ids, IGNORE)
    places = place(model, padded.positions)
    found = next_token_losses(model, targets, input_ids=padded.ids, attention_mask=padded.mask, **places)
    return found.losses.double().sum(1).tolist()


def by_writing(model: nn.Module, evaluation: EvaluationSet, batch: list[Encoded], world: World) -> list[Scored]:
    """The tokens that the model writes after each prompt, the likeliest one at a time."""
    padded = pad([item.input_ids for item in batch], world.device, side="left")
    written = greedy(model, padded, evaluation.max_new_tokens, evaluation.stops, world)
    return [
        Scored(item.example, item.choice, tokens=len(tokens), output=tuple(tokens))
        for item, tokens in zip(batch, written, strict=True)
    ]


def greedy(model: nn.Module, padded: Padded, limit: int, stops: Sequence[int], world: World) -> list[list[int]]:
    """Greedy decoding of left-padded prompts: at most `limit` tokens a row, up to a stop token (left out).

    In lockstep all ranks go on until every rank is done: each pass is a collective operation under ZeRO-3.
    """
    stop = torch.tensor(sorted(stops), device=padded.ids.device)
    tokens, mask, positions, cache = padded.ids, padded.mask, padded.positions, None
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    columns: list[torch.Tensor] = []
    for _ in range(limit):
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **place(model, positions),
            **keep_logits(model, 1),
        )
        cache = output.past_key_values
        tokens = output.logits[:, -1:].argmax(-1)
        done = done | torch.isin(tokens[:, 0], stop)
        columns.append(torch.where(done, -1, tokens[:, 0]))
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        positions = positions[:, -1:] + 1
        if _all_done(bool(done.all()), world):
            break
    rows = torch.stack(columns, 1).tolist()
    return [[token for token in row if token >= 0] for row in rows]


def _all_done(here: bool, world: World) -> bool:
    """Whether this rank may stop writing: in lockstep, only when all may."""
    if not world.lockstep or world.size == 1:
        return here
    waiting = torch.tensor(int(not here))
    torch.distributed.all_reduce(waiting, group=world.group)
    return waiting.item() == 0


SCORERS = {"head": by_head, "likelihood": by_likelihood, "choices": by_choice, "greedy": by_writing}
