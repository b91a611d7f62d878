"""The training loss of each example: under the language-model head, or under the classifier head of its task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from curlora.continual import Example, StepOutput
from pipelines.data.encoding import IGNORE
from pipelines.distributed.world import World
from pipelines.models.heads import heads_of, trainable_heads
from pipelines.models.losses import next_token_losses, position_ids, unpacked
from pipelines.models.padding import last_token_features
from pipelines.training.batches import MicroBatch, collate


def example_losses(model: nn.Module, batch: MicroBatch, held: Iterable[str] = ()) -> tuple[torch.Tensor, StepOutput]:
    """(batch,) loss of each example: mean cross-entropy of its target tokens, or of its class under its head.

    Args:
        held: tasks with frozen heads that may still have examples in the batch; the same on every rank.
    """
    places, examples = batch.places, batch.examples
    found = next_token_losses(model, batch.labels, places, input_ids=batch.input_ids, **_seen(model, batch))
    hidden = found.hidden
    mask = batch.attention_mask if places is None else (places >= 0).long()
    learned = (unpacked(batch.labels, places)[:, 1:] != IGNORE) & (mask[:, 1:] > 0)
    losses = found.losses.sum(1) / learned.sum(1).clamp(min=1)
    features = last_token_features(hidden, mask)
    used = heads_of(model, held) | trainable_heads(model)
    headless = {e.task for e in examples if e.labels is None} - used.keys()
    if headless:
        raise ValueError(f"examples of {', '.join(sorted(headless))} have neither labels nor a head in use")
    for task, head in used.items():
        # every head runs on every rank: under ZeRO a parameter or gradient missing on one rank is a deadlock
        scores = head(features.to(head.weight.dtype)).float()
        classes = [e.target if e.task == task and e.labels is None else IGNORE for e in examples]
        targets = torch.tensor(classes, device=hidden.device)
        losses = losses + nn.functional.cross_entropy(scores, targets, ignore_index=IGNORE, reduction="none")

    def held_scores(hidden: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        features = last_token_features(hidden, mask)
        return {task: head(features.to(head.weight.dtype)).float() for task, head in heads_of(model, held).items()}

    return losses, StepOutput(losses.sum(), hidden, mask, logits=found.logits, held_scores=held_scores)


def _seen(model: nn.Module, batch: MicroBatch) -> dict:
    """What a token may attend to, as an argument of the model."""
    if batch.position_ids is None:
        return {"attention_mask": batch.attention_mask}
    # without a mask, Transformers separates packed documents and examples where positions restart; padding follows the
    # real tokens, which never attend to it
    return position_ids(model, batch.position_ids)


def losses_alone(model: nn.Module, examples: Sequence[Example], device: torch.device) -> torch.Tensor:
    """(batch,) differentiable losses of examples that only this process has; strategies call it after training."""
    return example_losses(model, collate(list(examples), World(0, 1, device)).to(device))[0]


@torch.no_grad()
def drawn_targets(
    model: nn.Module, examples: Sequence[Example], device: torch.device, seed: Sequence[int]
) -> list[Example]:
    """The examples with every target replaced by one that the model draws from its own prediction.

    The draws depend on the seed and the place of the example only. Gradients of the loss on them give the Fisher
    information, where targets of the data would give the empirical one.
    """
    batch = collate(list(examples), World(0, 1, device)).to(device)
    ids = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE)
    found = next_token_losses(model, ids, input_ids=batch.input_ids, **_seen(model, batch))
    features = last_token_features(found.hidden, batch.attention_mask)
    trained = trainable_heads(model)
    drawn = []
    for row, example in enumerate(examples):
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([*seed, row]).generate_state(1)[0]))
        if example.labels is not None:
            tokens = _draw(found.logits([row], len(example.input_ids) - 1)[0], generator)
            pairs = zip(example.labels[1:], tokens, strict=True)
            labels = (IGNORE, *(IGNORE if label == IGNORE else token for label, token in pairs))
            drawn.append(replace(example, labels=labels))
        else:
            head = trained[example.task]
            scores = head(features[row : row + 1].to(head.weight.dtype))
            drawn.append(replace(example, target=_draw(scores, generator)[0]))
    return drawn


def _draw(logits: torch.Tensor, generator: torch.Generator) -> list[int]:
    """One index for each row of logits (rows, choices), by inversion: the random numbers come from the CPU."""
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    cumulated = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulated, uniform * cumulated[:, -1:])[:, 0].clamp(max=logits.shape[-1] - 1).tolist()
