"""One rank of test_validation_zero.py: a step that is validated and stops early, whole and interrupted at every step.

Run by torchrun as ``validation_zero_worker.py STAGES BASE OUT``. Checkpoints go through files, as in a run.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import torch
from strategies_zero_worker import adapt, examples, report_of, total

from curlora.continual import TaskContext, make_strategy
from curlora.continual.parameters import adapter_parameters, read, swapped, write
from pipelines.config.sections import TrainingConfig
from pipelines.distributed import engine
from pipelines.errors import Stopped
from pipelines.evaluation.sampling import sample_text
from pipelines.models import heads
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan
from pipelines.training import checkpoint
from pipelines.training.arguments import training_arguments
from pipelines.training.example_losses import losses_alone
from pipelines.training.trainer import ContinualTrainer, ControlRequests
from pipelines.training.validation import Validation

STEPS = 12
TRAINING = TrainingConfig(
    max_steps=STEPS,
    batch_size=8,
    gradient_accumulation=2,
    learning_rate=3e-2,
    scheduler="constant",
    validate_every=2,
    patience=2,
)
PLAIN = TRAINING.model_copy(update={"max_steps": 4, "validate_every": None, "patience": None})
CASES = {
    "ilora": {"share": 0.4, "consistency": 5.0, "decay": 0.8},  # it is evaluated with other weights than it trains
    "replay": {"size": 6},
    "rehearsal": {"share": 0.2, "base_share": 0.3, "base_rows": 20, "base_length": 6, "distill": 1.0},
    "ewc": {"strength": 1e3, "examples": 5},
    "curvature": {"base_rows": 20, "base_length": 6, "examples": 20, "strength": 1e2},
}


class Rehearsed:
    """The two steps of one case: `first` as it is, `second` from the state that `first` has left."""

    def __init__(self, name: str, base, config: dict, world, scratch: Path):
        self.name, self.config, self.world, self.scratch, self.base = name, config, world, scratch, base
        self.published: dict = {}
        self.state: tuple = ({}, {})

    def first(self) -> None:
        strategy = make_strategy(self.name, **CASES[self.name])
        self.published, _, _ = self._train(strategy, self._context("first", 1), PLAIN, None, None, None)
        self.state = strategy.state()

    def second(self, stop_after: int | None = None, resume: bool = False) -> dict | None:
        """What the step publishes and records; None if it was stopped."""
        strategy, context = make_strategy(self.name, **CASES[self.name]), self._context("second", 2)
        strategy.load_state(*self.state)
        run, plan = RunDirectory(str(self.scratch)), StepPlan(2, ("second",), "0123456789abcdef", None)
        found = checkpoint.newest(run, plan)[0] if resume else None
        try:
            weights, validation, kept = self._train(strategy, context, TRAINING, found, stop_after, (run, plan))
        except Stopped:
            return None
        tensors, values = strategy.state()
        return {
            "weights": {name: tensor.flatten().tolist() for name, tensor in weights.items()},
            "strategy": {name: tensor.double().flatten().tolist() for name, tensor in tensors.items()},
            "values": values,
            "losses": [(step, loss) for step, loss, _ in validation.curve],
            "best": (validation.best.step, validation.best.loss),
            "resumed_at": found.step if found else None,
            "loss of what is kept": kept,
        }

    def _context(self, task: str, position: int) -> TaskContext:
        def ready(model):
            return engine.ready_for_inference(model, self.config, self.world)

        def write_rows(model, rows, length):
            with ready(model):
                return sample_text(model, rows, length, 1, 0, self.world)

        places = {"rank": self.world.rank, "size": self.world.size, "total": total, "write": write_rows}
        places |= {"ready": ready, "losses": lambda model, rows: losses_alone(model, rows, self.world.device)}
        return TaskContext(task, position, 0, examples(task, position), **places)

    def _train(self, strategy, context, training, resume, stop_after, place):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()
        model = adapt(self.base, "curlora")
        try:
            if self.published:
                write(adapter_parameters(model), self.published)
            heads.train_heads(model, (context.name,))
            strategy.before_task(model, context)
            if resume:
                strategy.load_state(resume.part("strategy"), resume.values["strategy"])
                engine.put_weights(model, resume.part("weight"))
            with tempfile.TemporaryDirectory() as scratch, engine.hooks_restored(model):
                return self._fit(model, strategy, context, training, resume, stop_after, place, scratch)
        finally:
            model.zero_grad(set_to_none=True)
            self.base = model.unload()

    def _validation(self, model, strategy, training, resume) -> Validation:
        @contextlib.contextmanager
        def evaluated():
            weights = strategy.evaluation_weights(model) or {}
            with swapped({n: p for n, p in model.named_parameters() if n in weights}, weights):
                yield

        rows = examples("second", 99)[:11]  # of another seed, so that their loss soon rises
        return Validation(rows, training, self.world, model, strategy, evaluated, {}, resume)

    def _fit(self, model, strategy, context, training, resume, stop_after, place, scratch):
        world, steps = self.world, training.max_steps

        validation = self._validation(model, strategy, training, resume) if training.validate_every else None

        def save(take) -> None:
            taken = take()
            if world.rank == 0:
                checkpoint.save(*place, taken)
            torch.distributed.barrier()

        def requests() -> ControlRequests:
            return ControlRequests(stop=stop_after is not None and trainer.step >= stop_after)

        done = resume.step if resume else 0
        arguments = training_arguments(training, steps, self.config, scratch, True, False, world.size, done)
        trainer = ContinualTrainer(
            model,
            arguments,
            context.examples,
            strategy,
            training,
            world,
            steps,
            on_points=lambda points: None,
            requests=requests,
            on_checkpoint=save,
            validation=validation,
            on_validation=lambda step: validation.measure(step),
            resume=resume,
        )
        trainer._next_synchronisation = 1
        try:
            trainer.train()
            kept = None
            if validation:
                validation.keep_best()
                kept = validation._loss()
            trainer.end_task(context)
            trained = read(adapter_parameters(model))
            return trained | (strategy.evaluation_weights(model) or {}), validation, kept
        finally:
            trainer.model_wrapped.destroy()
            trainer.accelerator.free_memory()


def whole_and_interrupted(base, config: dict, world) -> dict:
    """Case → the step whole, and stopped after an optimizer step and continued."""
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        torch.distributed.broadcast_object_list(shared, src=0)
        for name in CASES:
            case = Rehearsed(name, base, config, world, Path(shared[0]) / name)
            case.first()
            report[name] = {"whole": case.second()}
            for stop in (1, 4) if name == "ilora" else (4,):
                assert case.second(stop_after=stop) is None
                torch.distributed.barrier()
                report[name][f"stopped after {stop}"] = case.second(resume=True)
                torch.distributed.barrier()
                RunDirectory(str(case.scratch)).remove("train")
                torch.distributed.barrier()
            base = case.base
        torch.distributed.barrier()
    return report


if __name__ == "__main__":
    report_of(sys.argv[1], sys.argv[2], Path(sys.argv[3]), whole_and_interrupted)
