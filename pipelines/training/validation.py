"""Validation during a step: the loss on held-out rows, the best state so far, and when to stop.

The loss is that of training (each example's mean token or class loss), of the weights that the strategy would be
evaluated with. Nothing random is drawn, and all of it is in the checkpoints: an interrupted step ends with the same
bits.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from curlora.continual import Example, Strategy
from pipelines.config.sections import TrainingConfig
from pipelines.distributed import engine
from pipelines.distributed.world import World
from pipelines.errors import DivergedError
from pipelines.runs.step_record import Validated
from pipelines.training.batches import collate
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.example_losses import example_losses


@dataclass(frozen=True)
class Best:
    """The state with the lowest validation loss: whole trained weights, and the strategy's own state."""

    step: int
    loss: float
    weights: dict[str, torch.Tensor]
    strategy_tensors: dict[str, torch.Tensor]
    strategy_values: dict


class Validation:
    """The validation of one step.

    Args:
        examples: validation rows of the step's tasks, encoded as for training.
        model: the bare model, called inside its training engine.
        evaluated: a context in which the model has the weights that the strategy evaluates with.
        moments: optimizer step → Unix time at which an interrupted process has reported it.
        resume: the checkpoint that training resumes from.

    Attributes:
        curve: [optimizer step, loss, Unix time] of every validation.
        best: None before the first validation.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        training: TrainingConfig,
        world: World,
        model: nn.Module,
        strategy: Strategy,
        evaluated: Callable[[], AbstractContextManager],
        moments: Mapping[int, float],
        resume: Checkpoint | None = None,
    ):
        self.examples, self.training, self.world = examples, training, world
        self.model, self.strategy, self.evaluated, self.moments = model, strategy, evaluated, moments
        self.curve: list[list[float]] = []
        self.best: Best | None = None
        if resume:
            self._load(resume)

    def is_due(self, step: int, total: int) -> bool:
        """Whether the state after this optimizer step of `total` is validated; the last one always is."""
        return step % self.training.validate_every == 0 or step == total

    @property
    def is_over(self) -> bool:
        """Whether training stops: no lower loss in `patience` validations."""
        return self.training.patience is not None and self._since_best >= self.training.patience

    @property
    def _since_best(self) -> int:
        return sum(point[0] > self.best.step for point in self.curve) if self.best else 0

    def measure(self, step: int) -> float:
        """Validate the state after an optimizer step; all ranks must call it, all get the same loss.

        Raises:
            DivergedError: the loss is not finite.
        """
        loss = self._loss()
        if not math.isfinite(loss):
            raise DivergedError(
                f"the validation loss is not finite after optimizer step {step}; lower training.learning_rate or "
                "training.max_grad_norm"
            )
        self.curve.append([step, loss, self.moments.get(step, time.time())])
        if self.best is None or loss < self.best.loss:
            tensors, values = self.strategy.state()
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            weights = engine.gathered_copy(
                {name: p for name, p in self.model.named_parameters() if p.requires_grad and "ds_" not in name}
            )
            self.best = Best(step, loss, weights, tensors, copy.deepcopy(values))
        return loss

    def _loss(self) -> float:
        """Mean loss of an example, over all ranks."""
        size = self.training.batch_size // self.training.gradient_accumulation
        mean = torch.zeros((), dtype=torch.float64)
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.evaluated():
            for start in range(0, len(self.examples), size):
                batch = list(self.examples[start : start + size])
                part = collate(batch, self.world).to(self.world.device)
                losses, _ = example_losses(self.model, part)
                mean += (losses.double().sum() * part.scale).cpu() * len(batch) / len(self.examples)
        self.model.train(was_training)
        total = self.world.total(mean)
        # that of rank 0, to the last bit: all ranks must decide alike
        return float(self.world.total(total if self.world.rank == 0 else torch.zeros_like(total)))

    def keep_best(self) -> None:
        """Give the model the best weights and the strategy its state of that moment; all ranks must call it."""
        if self.best and self.curve[-1][0] != self.best.step:
            engine.put_weights(self.model, self.best.weights)
            self.strategy.load_state(self.best.strategy_tensors, copy.deepcopy(self.best.strategy_values))

    # -- records and checkpoints

    def record(self, total: int) -> Validated:
        """What `metrics.json` holds; `total` optimizer steps were planned."""
        stopped = self.curve[-1][0] < total
        return Validated(self.curve, self.best.step, self.best.loss, len(self.examples), stopped)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and JSON for a checkpoint."""
        if self.best is None:
            return {}, {"curve": []}
        tensors = {f"best/{name}": tensor for name, tensor in self.best.weights.items()}
        tensors |= {f"best_strategy/{name}": tensor for name, tensor in self.best.strategy_tensors.items()}
        best = {"step": self.best.step, "loss": self.best.loss, "strategy": self.best.strategy_values}
        return tensors, {"curve": [list(point) for point in self.curve], "best": best}

    def _load(self, resume: Checkpoint) -> None:
        values = resume.values["validation"]
        self.curve = values["curve"]
        if found := values.get("best"):
            tensors = resume.part("best"), resume.part("best_strategy")
            self.best = Best(found["step"], found["loss"], *tensors, found["strategy"])
