"""The training loss of each example: under the language-model head, or under the classifier head of its task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from curlora.continual import Example, StepOutput
from pipelines.data.encoding import IGNORE
from pipelines.distributed.world import World
from pipelines.models.heads import heads_of, trainable_heads
from pipelines.models.losses import next_token_losses, position_ids
from pipelines.models.padding import last_token_features
from pipelines.training.batches import MicroBatch, collate


def example_losses(model: nn.Module, batch: MicroBatch, held: Iterable[str] = ()) -> tuple[torch.Tensor, StepOutput]:
    """(batch,) loss of each example: mean cross-entropy of its target tokens, or of its class under its head.

    Args:
        held: tasks with frozen heads that may still have examples in the batch; the same on every rank.
    """
    labels, mask, examples = batch.labels, batch.attention_mask, batch.examples
    if batch.position_ids is None:
        seen = {"attention_mask": mask}
    else:
        # without a mask, Transformers separates packed documents where positions restart; padding follows the
        # real tokens, which never attend to it
        seen = position_ids(model, batch.position_ids)
    found = next_token_losses(model, labels, input_ids=batch.input_ids, **seen)
    hidden = found.hidden
    losses = found.losses.sum(1) / (labels[:, 1:] != IGNORE).sum(1).clamp(min=1)
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


def losses_alone(model: nn.Module, examples: Sequence[Example], device: torch.device) -> torch.Tensor:
    """(batch,) differentiable losses of examples that only this process has; strategies call it after training."""
    return example_losses(model, collate(list(examples), World(0, 1, device)).to(device))[0]
