"""Unconditional sampling from the model, sharded over the workers.

The samples depend only on the seed and the index of the batch, so they are the same on any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pipelines.distributed.world import World, gather_everywhere
from pipelines.models.losses import cache_argument, keep_last

BATCH = 32  # sequences per forward pass


def sample_text(
    model: nn.Module,
    rows: int,
    length: int,
    start: int,
    seed: int,
    world: World,
    forbidden: Sequence[int] = (),
    progress: Callable[[int], None] = lambda rows: None,
) -> list[tuple[int, ...]]:
    """`rows` sequences of `length` tokens, `start` included, sampled at temperature 1; the same on every rank.

    Every rank must call it, with a model that can run a forward pass (under ZeRO-3: inside
    `engine.ready_for_inference`).

    Args:
        start: the first token of every sequence.
        forbidden: tokens that are never sampled.
        progress: called after every batch with the number of rows written so far on all ranks.
    """
    sizes = [min(BATCH, rows - first) for first in range(0, rows, BATCH)]
    mine: dict[int, list[tuple[int, ...]]] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for number in range(0, len(sizes), world.size):
            batch = number + world.rank
            if batch < len(sizes):
                mine[batch] = _sample(model, sizes[batch], length, start, [seed, batch], world.device, forbidden)
            elif world.lockstep:  # every rank runs the same number of forward passes
                _sample(model, 1, length, start, [seed, 0], world.device, forbidden)
            progress(sum(sizes[: number + world.size]))
    model.train(was_training)
    sampled = dict(gather_everywhere(list(mine.items()), world))
    return [sequence for batch in sorted(sampled) for sequence in sampled[batch]]


def _sample(model, rows: int, length: int, start: int, seed, device, forbidden) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
    tokens = torch.full((rows, 1), start, dtype=torch.long, device=device)
    columns, cache = [tokens], None
    cache_name = cache_argument(model)
    for _ in range(length - 1):
        seen = tokens if cache_name else torch.cat(columns, 1)
        carried = {cache_name: cache} if cache_name else {}
        output = model(input_ids=seen, use_cache=bool(cache_name), **carried, **keep_last(model, seen))
        cache = getattr(output, cache_name) if cache_name else None
        logits = output.logits[:, -1].float().cpu()
        logits[:, list(forbidden)] = -torch.inf
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator).to(device)
        columns.append(tokens)
    return [tuple(row) for row in torch.cat(columns, 1).tolist()]
