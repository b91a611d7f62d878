"""Trains and saves one step on a worker."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from curlora.continual import Example, Strategy, TaskContext, make_strategy
from curlora.continual.parameters import swapped
from pipelines.config.paths import public_name
from pipelines.data.held_out import validation_part
from pipelines.data.sets import training_examples
from pipelines.distributed import engine
from pipelines.errors import DivergedError, Stopped
from pipelines.evaluation.sampling import sample_text
from pipelines.models import adapters, heads
from pipelines.models.bank import BASE_LENGTH, BASE_ROWS, Bank
from pipelines.runs.identity import StepPlan, fingerprint
from pipelines.runs.step_record import PublishedFile, Seconds, TrainedStep, Training
from pipelines.training import checkpoint
from pipelines.training.arguments import optimizer_steps, training_arguments
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.example_losses import losses_alone
from pipelines.training.reports import Reports
from pipelines.training.trainer import ContinualTrainer
from pipelines.training.validation import Validation
from pipelines.workers.assignment import RungScores, rung_file, verdict_file
from pipelines.workers.context import WorkContext
from pipelines.workers.control import Control
from pipelines.workers.live_feed import LiveFeed, feed_of
from pipelines.workers.resident_model import ResidentModel, sha256, stdout_to_stderr
from pipelines.workers.step_scoring import StepScoring
from pipelines.workers.training_log import TrainingLog

VERDICT_SECONDS = 0.1  # between two checks for a trial's verdict


@dataclass(frozen=True)
class Fitted:
    """Outcome of training a step: its record, the full trained weights and the seconds it took."""

    training: Training
    weights: dict[str, torch.Tensor]
    seconds: float


class StepTraining:
    """Trains the steps of one assignment."""

    def __init__(self, work: WorkContext, resident: ResidentModel, scoring: StepScoring, control: Control):
        self.work, self.resident, self.scoring, self.control = work, resident, scoring, control

    def learn(self, plan: StepPlan) -> tuple[nn.Module, TrainedStep]:
        """Train and save a step; returns the model and the content of `trained.json`."""
        work, begun = self.work, time.time()
        parent = plan.parent if plan.parent != work.assignment.base_fingerprint else None
        model = self.resident.attach(parent, extend=True)
        heads.train_heads(model, plan.tasks)
        trainable, in_heads = adapters.adapter_parameters(model), _head_parameters(model)
        strategy = strategy_after(parent, work, self.resident)
        bank = self._bank(parent, model) if work.config.adapter.carry == "bank" else None
        resume = newest_checkpoint(work, plan)
        feed = feed_of(work, plan) if work.is_writer else None
        started = feed.started if feed else begun
        history = resume.values if resume else {"started": started, "seconds": 0.0, "curve": [], "resumed_at": []}
        fitted = self._train(model, plan, strategy, resume, history, feed)
        if bank:
            with self._ready(model):
                bank.add(model, plan.label, self._examples(plan), fitted.weights)
            bank.attach(model)
        with tempfile.TemporaryDirectory() as scratch:
            if bank and work.is_writer:
                bank.save(Path(scratch))
            adapter_bytes, files = self._save(model, strategy, fitted.weights, Path(scratch), plan)
        trained = TrainedStep(
            trainable_parameters=trainable,
            head_parameters=in_heads,
            adapter_bytes=adapter_bytes,
            files=files,
            training=fitted.training,
            started=history["started"],
            seconds=Seconds(train=fitted.seconds, total=history["seconds"] + time.time() - begun),
        )
        if work.is_writer:
            work.run.write_json(f"{plan.directory}/trained.json", trained)
            work.run.remove(plan.checkpoints)
            work.run.remove(plan.live)
        work.world.barrier()
        return model, trained

    def _bank(self, parent: str | None, model: nn.Module) -> Bank:
        """The bank of the parent step; before the first task, one that knows the base by text that it writes."""
        bank = self.resident.bank(parent) if parent else None
        if bank is None:
            bank = Bank()
            length = min(BASE_LENGTH, self.work.config.training.max_length)
            written = self._sample_text(model, BASE_ROWS, length)
            with self._ready(model):
                bank.begin(model, written)
        return bank

    # -- training

    def _train(
        self,
        model: nn.Module,
        plan: StepPlan,
        strategy: Strategy,
        resume: Checkpoint | None,
        history: dict,
        feed: LiveFeed | None,
    ) -> Fitted:
        """Train the step's tasks."""
        work = self.work
        work.heartbeat.report("preparing", task=plan.label)
        begun = time.time()
        examples = self._examples(plan)
        steps = optimizer_steps(work.config.training, len(examples), len(plan.tasks))
        context = self._task_context(plan, examples, steps)
        strategy.before_task(model, context)
        if not any(p.requires_grad for p in model.parameters()):
            return Fitted(Training(0, 0, 0.0, None, []), {}, time.time() - begun)
        if resume:
            strategy.load_state(resume.part("strategy"), resume.values["strategy"])
            engine.put_weights(model, resume.part("weight"))
        moments = feed.moments if feed else {}
        log = TrainingLog(work, self.control, plan, steps, history, resume.step if resume else 0, moments)
        with tempfile.TemporaryDirectory() as scratch, engine.hooks_restored(model):
            validation = self._validation(model, plan, strategy, feed, resume)
            trainer = self._trainer(model, examples, strategy, steps, scratch, log, validation, resume)
            self._run_trainer(trainer, log, feed)
            if validation:
                validation.keep_best()
            trainer.end_task(context)
            weights = trained_weights(model, strategy, self.resident.learned | set(plan.tasks))
            tokens = work.world.sum(trainer.tokens) + (resume.values["tokens"] if resume else 0)
            end_engine(trainer)
        training = Training(
            steps=int(log.points[-1][0]),
            tokens=tokens,
            tokens_per_second=tokens / log.trained,
            final_loss=log.points[-1][1],
            curve=log.points,
            resumed_at=log.resumed_at,
            series=feed.series if feed else None,
            validation=validation.record(steps) if validation else None,
        )
        return Fitted(training, weights, history["seconds"] + time.time() - begun - log.scored)

    def _run_trainer(self, trainer: ContinualTrainer, log: TrainingLog, feed: LiveFeed | None) -> None:
        log.tokens = lambda: trainer.tokens
        if feed:
            feed.curve, feed.tokens = lambda: log.points, log.all_tokens
            log.reports = reports_of(self.work, log.plan, trainer)
        with stdout_to_stderr(), self.work.heartbeat.guard(), feed.running() if feed else contextlib.nullcontext():
            started = time.perf_counter()
            try:
                trainer.train()
            except (Stopped, DivergedError):  # raised on all ranks: ending the engine is safe and keeps the base
                end_engine(trainer)
                raise
            finally:
                if log.reports:
                    log.reports.close()
            log.trained += time.perf_counter() - started - log.scored - log.validated

    def _examples(self, plan: StepPlan, split: str = "train") -> Sequence[Example]:
        training = self.work.config.training
        length = min(training.max_length, self.resident.context)
        tasks = [self.work.config.task(name) for name in plan.tasks]
        if split == "validation":
            tasks = [validation_part(task) for task in tasks]
        at_most = training.max_train_examples
        return training_examples(tasks, self.resident.tokenizer, length, at_most, training.seed, split)

    def _validation(
        self,
        model: nn.Module,
        plan: StepPlan,
        strategy: Strategy,
        feed: LiveFeed | None,
        resume: Checkpoint | None,
    ) -> Validation | None:
        work = self.work
        if not work.config.training.validate_every:
            return None
        validation = Validation(
            self._examples(plan, "validation"),
            work.config.training,
            work.world,
            model,
            strategy,
            evaluated=lambda: weights_to_evaluate(model, strategy),
            moments=feed.validated if feed else {},
            resume=resume,
        )
        if feed:
            feed.validation = lambda: validation.curve
        return validation

    def _task_context(self, plan: StepPlan, examples: Sequence[Example], steps: int) -> TaskContext:
        world = self.work.world
        return TaskContext(
            plan.label,
            plan.depth,
            self.work.config.training.seed,
            examples,
            steps=steps,
            losses=lambda model, rows: losses_alone(model, rows, world.device),
            ready=self._ready,
            write=self._sample_text,
            rank=world.rank,
            size=world.size,
            total=world.total,
        )

    @contextlib.contextmanager
    def _ready(self, model: nn.Module) -> Iterator[None]:
        """A context in which a strategy can run passes before a step is trained."""
        self.work.heartbeat.report("measuring")
        with engine.ready_for_inference(model, self.work.settings, self.work.world), self.work.heartbeat.guard():
            yield

    def _sample_text(self, model: nn.Module, rows: int, length: int) -> list[tuple[int, ...]]:
        """Unconditional samples from the model, for strategies, before a step is trained."""
        work, tokenizer = self.work, self.resident.tokenizer

        def progress(done: int) -> None:
            work.heartbeat.report("writing", done=done, count=rows)

        progress(0)
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        start = next(token for token in ends if token is not None)
        forbidden = [tokenizer.pad_token_id] if tokenizer.pad_token_id not in (None, *ends[:2]) else []
        length = min(length, work.config.training.max_length, self.resident.context)
        seed = work.config.training.seed
        with engine.ready_for_inference(model, work.settings, work.world), work.heartbeat.guard():
            return sample_text(model, rows, length, start, seed, work.world, forbidden, progress)

    def _trainer(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        strategy: Strategy,
        steps: int,
        scratch: str,
        log: TrainingLog,
        validation: Validation | None,
        resume: Checkpoint | None,
    ) -> ContinualTrainer:
        from accelerate.state import AcceleratorState  # only after DeepSpeed's environment is set

        AcceleratorState._reset_state()  # a process-wide singleton: every step brings its own DeepSpeed plugin
        work, training = self.work, self.work.config.training
        arguments = training_arguments(
            training,
            steps,
            work.settings,
            scratch,
            cpu=work.world.device.type == "cpu",
            bf16=work.config.base_model.dtype == "bfloat16",
            world_size=work.world.size,
            done=resume.step if resume else 0,
        )
        return ContinualTrainer(
            model,
            arguments,
            examples,
            strategy,
            training,
            work.world,
            steps,
            on_points=log.add,
            requests=self.control.requests,
            on_checkpoint=log.write_checkpoint,
            validation=validation,
            on_validation=lambda step: log.validate(validation, step),
            rungs=work.assignment.rungs,
            on_rung=lambda rung, take: self._rung(model, strategy, log, rung, take()),
            resume=resume,
        )

    # -- a trial's rungs

    def _rung(self, model: nn.Module, strategy: Strategy, log: TrainingLog, rung: float, state: Checkpoint) -> None:
        """Score a trial in the middle of its training, write a checkpoint, and wait for the verdict.

        Raises:
            Stopped: the trial ends at this rung.
        """
        work, begun = self.work, time.perf_counter()
        path, directory = rung_file(rung), log.plan.directory
        if not work.world.sum(int(work.is_writer and work.run.exists(path))):
            with weights_to_evaluate(model, strategy):
                cells = self.scoring.score(model, directory, work.assignment.missing[directory], training=True)
            if work.is_writer:
                step, loss = log.points[-1][0], log.recent_loss()
                work.run.write_json(path, RungScores(rung, tuple(cells), time.time(), step, log.steps, loss))
        log.write_checkpoint(lambda: state)
        goes_on = work.world.sum(int(work.is_writer and self._wait_for_verdict(rung)))
        log.scored += time.perf_counter() - begun
        if not goes_on:
            raise Stopped(f"the trial ends at {rung:.0%} of its training")

    def _wait_for_verdict(self, rung: float) -> bool:
        """Whether the trial continues. Rank 0 waits for the driver, the other ranks for rank 0."""
        while True:
            self.work.heartbeat.beat()
            verdict = self.work.run.read_json(verdict_file(rung))
            if verdict is not None:
                return verdict["go_on"]
            if self.control.stop_requested():
                return False
            time.sleep(VERDICT_SECONDS)

    # -- saving

    def _save(
        self, model: nn.Module, strategy: Strategy, weights: dict[str, torch.Tensor], scratch: Path, plan: StepPlan
    ) -> tuple[int, dict[str, PublishedFile]]:
        """Upload adapter, heads and strategy state; returns the adapter's size in bytes and the files (rank 0)."""
        work, adapter_bytes, files = self.work, 0, {}
        tensors, values = strategy.state()
        self.control.check_lease()
        if work.is_writer:
            if weights:
                base, _ = public_name(work.config.base_model.path)
                adapter_bytes = adapters.save_adapter(model, weights, scratch, base)
            if tensors or values:
                (scratch / "strategy").mkdir()
                save_file(tensors, scratch / "strategy" / "state.safetensors")
                (scratch / "strategy" / "state.json").write_text(json.dumps(values))
            for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
                identity = PublishedFile(file.stat().st_size, sha256(file))
                files[file.relative_to(scratch).as_posix()] = identity
            work.run.upload(scratch, plan.directory)
        work.world.barrier()
        return adapter_bytes, files


def strategy_after(parent: str | None, work: WorkContext, resident: ResidentModel) -> Strategy:
    """The strategy, with its state after the parent step."""
    strategy = make_strategy(work.config.strategy.name, **work.config.strategy.options)
    if parent is not None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = resident.step_files(parent, Path(scratch)) / "strategy"
            if (folder / "state.json").exists():
                tensors = folder / "state.safetensors"
                strategy.load_state(
                    load_file(tensors) if tensors.exists() else {}, json.loads((folder / "state.json").read_text())
                )
    return strategy


def newest_checkpoint(work: WorkContext, plan: StepPlan) -> Checkpoint | None:
    """The checkpoint to resume from: rank 0 chooses it, all ranks load it."""
    found, damaged = checkpoint.newest(work.run, plan) if work.is_writer else (None, [])
    for reason in damaged:
        work.event("checkpoint_skipped", plan, reason=reason)
    step = work.world.sum(found.step if found else 0)
    if not step:
        return None
    work.event("resumed", plan, step=step)
    return found or checkpoint.load(work.run, plan, step)


def reports_of(work: WorkContext, plan: StepPlan, trainer: ContinualTrainer) -> Reports | None:
    """The other tools that a step is reported to; None if there are none."""
    tracking, name = work.config.tracking, plan.directory.rpartition("/")[2]
    if not tracking or not tracking.report_to:
        return None
    trainer.args.run_name = f"{work.run.name}-{name}"
    return Reports(
        tracking.report_to,
        trainer.args,
        trainer.model,
        folder=f"{work.run.root if work.run.is_local else work.run.uri}/tensorboard/{name}",
        wandb={
            "WANDB_PROJECT": tracking.experiment or work.run.name,
            "WANDB_RUN_GROUP": work.run.name,
            "WANDB_RUN_ID": fingerprint([work.run.uri, plan.fingerprint])[:16],
            "WANDB_RESUME": "allow",
        },
        warn=lambda text: work.event("warning", plan, text=text),
    )


@contextlib.contextmanager
def weights_to_evaluate(model: nn.Module, strategy: Strategy) -> Iterator[None]:
    """Inside, the model has the strategy's evaluation weights; afterwards, its training weights again."""
    evaluated = strategy.evaluation_weights(model) or {}
    with swapped({name: p for name, p in model.named_parameters() if name in evaluated}, evaluated):
        yield


def trained_weights(model: nn.Module, strategy: Strategy, learned: Collection[str]) -> dict[str, torch.Tensor]:
    """Full fp32 weights to publish, by parameter name, the adapter's buffers included.

    Includes only the heads of the tasks `learned` so far: the others are initialised from their names when needed. If
    a strategy evaluates with other weights than it trains, those are also written into the model.
    """
    prefix = adapters.adapter_prefix(model)
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if (prefix in name or heads.task_of(name) in learned) and "ds_" not in name
    }
    engine.put_weights(model, strategy.evaluation_weights(model) or {})
    weights = engine.gathered_copy(chosen)
    buffers = {name: b.detach().cpu().clone() for name, b in model.state_dict().items() if prefix in name}
    return {**{name: b for name, b in buffers.items() if name not in chosen}, **weights}


def end_engine(trainer: ContinualTrainer) -> None:
    """Free the engine's memory; the model stays."""
    trainer.model_wrapped.destroy()
    trainer.accelerator.free_memory()
    trainer.model.zero_grad(set_to_none=True)


def _head_parameters(model: nn.Module) -> int:
    return sum(
        getattr(p, "ds_numel", p.numel()) for head in heads.trainable_heads(model).values() for p in head.parameters()
    )
