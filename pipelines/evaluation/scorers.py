"""Scorers run a model on a batch: by classifier head, likelihood, choices or greedy decoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pipelines.data.encoding import IGNORE, Encoded
from pipelines.data.kinds.base import EvaluationSet, Scored
from pipelines.distributed.world import World
from pipelines.models.heads import get_head
from pipelines.models.losses import (
    CACHE_ARGUMENTS,
    cache_argument,
    keep_last,
    last_hidden,
    next_token_losses,
    position_ids,
    token_nll,
)
from pipelines.models.padding import Padded, last_token_features, pad

KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache whose rows can be repeated for the alternatives of a prompt."""


def by_head(model: nn.Module, evaluation: EvaluationSet, batch: list[Encoded], world: World) -> list[Scored]:
    """The class that the task's head predicts for each sequence."""
    padded = pad([item.input_ids for item in batch], world.device)
    hidden, _ = last_hidden(model, input_ids=padded.ids, attention_mask=padded.mask, **keep_last(model, padded.ids))
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
    """Summed NLL of each alternative given its prompt; the prompt runs once for all alternatives of an example.

    Under ZeRO-3 every batch takes exactly two forward passes, whatever its lengths.
    """
    cache_name = cache_argument(model)
    if cache_name is None or any(item.start < 1 for item in evaluation.items):
        return by_likelihood(model, evaluation, batch, world)
    questions = [list(group) for _, group in itertools.groupby(batch, key=lambda item: item.example)]
    prompts = pad([group[0].input_ids[: group[0].start] for group in questions], world.device, side="left")
    seen = model(
        input_ids=prompts.ids,
        attention_mask=prompts.mask,
        use_cache=True,
        **position_ids(model, prompts.positions),
        **keep_last(model, prompts.ids),
    )
    cache = getattr(seen, cache_name)
    if not all(type(layer) in KEYS_AND_VALUES for layer in getattr(cache, "layers", [None])):
        return by_likelihood(model, evaluation, batch, world)  # e.g. a recurrent state, which is no key-value cache
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
            use_cache=True,
            **{cache_name: cache},
            **position_ids(model, positions),
        ).logits
        if later:
            sums += (token_nll(logits, answers.ids[:, 1:]).double() * answers.mask[:, 1:]).sum(1)
    return [
        Scored(item.example, item.choice, value, len(item.input_ids) - item.start)
        for item, value in zip(batch, sums.tolist(), strict=True)
    ]


def sequence_nll(model: nn.Module, padded: Padded, starts: Sequence[int]) -> list[float]:
    """Summed NLL of each row's tokens from position `starts` on (≥ 1; padding on either side is not counted)."""
    counted = padded.mask.bool() & (padded.positions >= torch.tensor(starts, device=padded.ids.device)[:, None])
    targets = torch.where(counted, padded.ids, IGNORE)
    positions = position_ids(model, padded.positions)
    found = next_token_losses(model, targets, input_ids=padded.ids, attention_mask=padded.mask, **positions)
    return found.losses.double().sum(1).tolist()


def by_generation(model: nn.Module, evaluation: EvaluationSet, batch: list[Encoded], world: World) -> list[Scored]:
    """The tokens that the model generates after each prompt by greedy decoding."""
    padded = pad([item.input_ids for item in batch], world.device, side="left")
    generated = greedy(model, padded, evaluation.max_new_tokens, evaluation.stops, world)
    return [
        Scored(item.example, item.choice, tokens=len(tokens), output=tuple(tokens))
        for item, tokens in zip(batch, generated, strict=True)
    ]


def greedy(
    model: nn.Module,
    padded: Padded,
    limit: int,
    stops: Sequence[int],
    world: World,
    ended: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """Greedy decoding of left-padded prompts: at most `limit` tokens per row, up to but excluding a stop token.

    Args:
        ended: whether the tokens of a row so far are its whole answer.

    In lockstep all ranks continue until every rank is done: under ZeRO-3 each pass is a collective operation.
    """
    stop = torch.tensor(sorted(stops), device=padded.ids.device)
    tokens, mask, positions, cache = padded.ids, padded.mask, padded.positions, None
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    columns: list[torch.Tensor] = []
    cache_name = cache_argument(model) or CACHE_ARGUMENTS[0]
    for _ in range(limit):
        output = model(
            input_ids=tokens,
            attention_mask=mask if cache is None or _is_of_tokens(cache) else None,
            use_cache=True,
            **{cache_name: cache},
            **position_ids(model, positions),
            **keep_last(model, tokens),
        )
        cache = getattr(output, cache_name)
        tokens = output.logits[:, -1:].argmax(-1)
        done = done | torch.isin(tokens[:, 0], stop)
        columns.append(torch.where(done, -1, tokens[:, 0]))
        if ended:
            rows = torch.stack(columns, 1).tolist()
            whole = [known or ended(row) for known, row in zip(done.tolist(), rows, strict=True)]
            done = torch.tensor(whole, device=tokens.device)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        positions = positions[:, -1:] + 1
        if _all_done(bool(done.all()), world):
            break
    rows = torch.stack(columns, 1).tolist()
    return [[token for token in row if token >= 0] for row in rows]


def _is_of_tokens(cache) -> bool:
    """Whether later passes attend to earlier tokens, which a mask may hide; a recurrent state has none."""
    layers = getattr(cache, "layers", None)
    return layers is None or any(isinstance(layer, DynamicLayer) for layer in layers)


def _all_done(here: bool, world: World) -> bool:
    """Whether this rank may stop decoding: in lockstep, only when all ranks may."""
    if not world.lockstep or world.size == 1:
        return here
    waiting = torch.tensor(int(not here))
    torch.distributed.all_reduce(waiting, group=world.group)
    return waiting.item() == 0


SCORERS = {"head": by_head, "likelihood": by_likelihood, "choices": by_choice, "greedy": by_generation}
