"""What one Ray Train worker does: for each step of its segment model, adapter, train, evaluate, publish.

The base is loaded once for the whole segment. A step starts from its parent's *published* adapter, so a segment of
one step and a segment of ten give the same bits. Everything that leaves a worker goes into the run directory; rank 0
writes it, `metrics.json` last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import tempfile
import time
import traceback
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from curlora.continual import Example, TaskContext, make_strategy
from curlora.continual.parameters import swapped
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.sections import AdapterConfig
from pipelines.config.tasks import ClassificationTask
from pipelines.data.kinds import kind_of
from pipelines.data.kinds.base import EvaluationSet
from pipelines.data.sets import evaluation_set, training_examples
from pipelines.distributed import engine, zero_settings
from pipelines.distributed.engine import writable
from pipelines.distributed.world import World, current_world
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.sampling import write_text
from pipelines.models import adapters, heads
from pipelines.runs import environment
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan, fingerprint, setting
from pipelines.runs.start import Start
from pipelines.training import checkpoint
from pipelines.training.arguments import optimizer_steps, training_arguments
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.trainer import ContinualTrainer, DivergedError, Stopped, Wishes
from pipelines.workers.assignment import Assignment, Queue, rung_file, verdict_file
from pipelines.workers.control import ASK_SECONDS, NOTICE_LOOKS, node_is_leaving
from pipelines.workers.failures import CONCERTED, DamagedStepError, explain, is_permanent
from pipelines.workers.heartbeat import Pulse
from pipelines.workers.resident_model import stdout_to_stderr
from pipelines.workers.step_scoring import SELF_TEST_LOGITS, SELF_TEST_TOKENS, is_finite
from pipelines.workers.step_training import (
    class_names,
    count_head_parameters,
    end_engine,
    peak_memory,
    put_weights,
    sha256,
    training_data_identity,
)
from pipelines.workers.training_log import TrainingLog, step_identity

QUEUE_SECONDS = 0.1  # between two looks for the next assignment

IDLE_SECONDS = 60.0


def serve(queue: Queue, verbose: bool) -> None:
    """Entry point of a Ray Train worker: take assignments from the queue until it ends."""
    _quiet(verbose)
    engine.prepare_environment()
    worker = Worker(current_world())
    number = 0
    while (told := _next(queue, number, worker.world))[0] != "end":
        kind, raw = told
        if kind == "task":
            result = worker.work(Assignment.from_json(raw))
            if worker.world.rank == 0:
                queue.finish(number, result)
        number += kind != "wait"


def _next(queue: Queue, number: int, world: World) -> tuple[str, dict | None]:
    """What there is to do: rank 0 asks, all hear."""
    told = [_ask(queue, number) if world.rank == 0 else None]
    if world.size > 1:
        torch.distributed.broadcast_object_list(told, src=0, group=world.group)
    return told[0]


def _ask(queue: Queue, number: int) -> tuple[str, dict | None]:
    """("task", assignment), ("done", None) if an earlier start of this group did it, ("end", None), or
    ("wait", None) after a while, so that no collective times out."""
    end = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < end:
        if queue.result(number):
            return "done", None
        if raw := queue.get(number):
            return "task", raw
        if queue.ended:
            return "end", None
        time.sleep(QUEUE_SECONDS)
    return "wait", None


def _quiet(verbose: bool) -> None:
    """The libraries' plumbing off: what a user should see goes through the run directory."""
    if verbose:
        return
    warnings.filterwarnings("ignore")
    for name in ("DeepSpeed", "deepspeed", "accelerate", "torch", "peft", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class Worker:
    """One process of a worker group. The base stays loaded from one assignment to the next where it is the same."""

    def __init__(self, world: World):
        self.world = world
        self.base: nn.Module | None = None
        self._loaded: str | None = None  # identity of the base that is loaded
        self._adapted: nn.Module | None = None  # the base with an adapter around it, until it is taken off
        self._learned: frozenset[str] = frozenset()  # tasks with a trained head in the step that was attached last
        self._encoded: dict[str, EvaluationSet] = {}  # by cell key, of all assignments so far

    def work(self, assignment: Assignment) -> dict:
        """Do an assignment; `{"stopped"}`, and of a trial that cannot succeed its `"error"`."""
        self.run_directory = RunDirectory(assignment.run_uri)
        config = PipelineConfig.model_validate(assignment.config)
        self.pulse = Pulse(self.run_directory, self.world.rank == 0, config.durability.hang_timeout)
        try:
            self._prepare(assignment, config)
            self._run()
            return {"stopped": False}
        except Stopped:
            if self._adapted is not None:
                self.base = adapters.detach_adapter(self._adapted)
            return {"stopped": True}
        except Exception as error:
            if assignment.trial and isinstance(error, CONCERTED):
                self._forget_base()
                return {"stopped": False, "error": explain(error)}
            if is_permanent(error):
                # Ray would start the worker group again, for the same error
                with contextlib.suppress(OSError):  # a full disk takes no event either; the error itself arrives
                    self.run_directory.event("worker_error", error=explain(error), traceback=traceback.format_exc())
            raise
        finally:
            self._adapted = None
            self.pulse.close()

    # -- set-up

    def _forget_base(self) -> None:
        """Whatever state it is in: the next assignment loads it anew."""
        self.base = self._loaded = self._adapted = None
        gc.collect()

    def _prepare(self, assignment: Assignment, config: PipelineConfig) -> None:
        self.assignment, self.config = assignment, config
        self.begun = time.time()
        self._looks = 0
        self._asked = self._kept = time.monotonic()
        self.settings = zero_settings.complete_settings(config, self.world.size)
        self.world = dataclasses.replace(self.world, lockstep=zero_settings.stage_of(self.settings) == 3)
        self.start = Start(**assignment.start) if assignment.start else None
        self.finished = self._finished_steps()
        identity = fingerprint([config.base_model.model_dump(), self.world.lockstep])
        if self._loaded != identity:
            self.base = None  # before the next one is loaded
            self._encoded.clear()
            self.base, self.tokenizer = self._load_base()
            self._loaded = identity
        self.pulse.watch(self.base)
        self.context = int(getattr(self.base.config, "max_position_embeddings", None) or 1024)
        self.classes = {
            task.name: len(kind_of(task).classes(task))
            for task in config.tasks
            if isinstance(task, ClassificationTask) and task.head == "classifier"
        }
        if self.start:
            self.classes = self._inherited_heads() | self.classes

    def _finished_steps(self) -> dict[str, tuple[RunDirectory, str]]:
        """Fingerprint → where the step lies: in this run, or, for what it starts from, in another one."""
        here = self.run_directory
        finished = {name: (here, directory) for name, directory in here.finished_steps().items()}
        if self.start:
            finished[self.start.fingerprint] = (self.start.run, self.start.directory)
        return finished

    def _inherited_heads(self) -> dict[str, int]:
        """Task → classes of the heads that the chain starts with: they stay, whether the tasks are listed or not."""
        from safetensors import safe_open

        with tempfile.TemporaryDirectory() as scratch:
            file = self._step_files(self.start.fingerprint, Path(scratch)) / "heads.safetensors"
            if not file.exists():
                return {}
            with safe_open(file, "pt") as saved:
                names = [name for name in saved.keys() if name.endswith(".weight")]  # noqa: SIM118
                return {name.removesuffix(".weight"): saved.get_slice(name).get_shape()[0] for name in names}

    def _load_base(self) -> tuple[nn.Module, object]:
        from transformers.integrations import HfDeepSpeedConfig

        from pipelines.models.base import load_base, load_tokenizer

        # under ZeRO-3 this object makes from_pretrained load shards only; it must stay referenced
        self._partitioning = HfDeepSpeedConfig(self.settings) if self.world.lockstep else None
        returned = engine.freed_memory_returned() if self._partitioning else contextlib.nullcontext()
        with stdout_to_stderr(), returned:
            model = load_base(self.config.base_model, None if self._partitioning else self.world.device)
        model.requires_grad_(False)
        model.config.use_cache = False
        return model, load_tokenizer(self.config.base_model)

    # -- the segment

    def _run(self) -> None:
        self._event("segment_started", None, world_size=self.world.size)
        self._evaluate_finished()
        for plan in self.assignment.steps:
            self._stop_if_asked()
            if self.run_directory.metrics(plan.directory) is None:
                self._step(plan)
            self.finished[plan.fingerprint] = (self.run_directory, plan.directory)

    def _evaluate_finished(self) -> None:
        """Row 0, and cells that finished steps lack (a task or a corpus was added later)."""
        for directory, names in self.assignment.missing.items():
            self._stop_if_asked()
            begun = time.time()
            metrics = self.run_directory.metrics(directory)
            if metrics is None and directory == self.assignment.base_directory:
                metrics = self._base_metrics()
            if metrics is None or not names:
                continue  # a step that is still to be trained brings its own row
            model = self._model_of(metrics)
            cells = self._evaluate(model, directory, names)
            self.base = self._detach(model)
            if self.world.rank == 0:
                metrics["cells"] += cells
                metrics["seconds"]["evaluate"] += time.time() - begun
                metrics["seconds"]["total"] += time.time() - begun
                metrics["finished"] = time.time()
                self.run_directory.write_json(f"{directory}/metrics.json", metrics)
                self.run_directory.event("evaluated", directory=directory, cells=cells)
            self._barrier()

    def _base_metrics(self) -> dict:
        return {
            "fingerprint": self.start.fingerprint if self.start else self.assignment.base_fingerprint,
            "position": 0,
            "tasks": [],
            "parent": None,
            "parent_run": self.start.run_uri if self.start else None,
            "cells": [],
            "seconds": {"train": 0.0, "evaluate": 0.0, "overhead": 0.0, "total": 0.0},
            "peak_memory_bytes": peak_memory(self.world.device),
            "started": self.begun,
            "finished": time.time(),
            "environment": self._environment(),
        }

    def _model_of(self, metrics: dict) -> nn.Module:
        """The model as a finished step left it (row 0: what the chain starts from, or the bare base)."""
        if metrics["position"] == 0 and self.start is None:
            heads.attach_heads(self.base, self.classes, self.config.training.seed)
            return self.base
        setting = metrics.get(
            "setting"
        )  # a search may change the adapter on the way; what a chain starts from has none
        trained_as = AdapterConfig.model_validate(setting["adapter"]) if setting else None
        return self._attach(metrics["fingerprint"], adapter=trained_as)

    def _detach(self, model: nn.Module) -> nn.Module:
        self._adapted = None
        return adapters.detach_adapter(model)

    def _attach(self, step: str | None, extend: bool = False, adapter: AdapterConfig | None = None) -> nn.Module:
        """Base, adapter and heads: those of a step (its fingerprint), or new ones; `extend` them for the next task."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = self._step_files(step, Path(scratch)) if step else None
            carried = folder / "adapter" if folder else None
            if carried is not None and not carried.exists():
                carried = None  # adapter: none has no file
            seed = self.config.training.seed
            model = adapters.attach_adapter(self.base, adapter or self.config.adapter, seed, carried, extend)
            self._adapted = model
            heads.attach_heads(model, self.classes, self.config.training.seed)
            self._learned = frozenset()
            if folder and (folder / "heads.safetensors").exists():
                from safetensors.torch import load_file

                saved = load_file(folder / "heads.safetensors")
                heads.load_heads(model, saved)
                self._learned = frozenset(name.rpartition(".")[0] for name in saved)
        return model if engine.is_partitioned(model) else model.to(self.world.device)

    def _step_files(self, step: str, scratch: Path) -> Path:
        """A local folder with the files of a step (its fingerprint), each the one that was published.

        Raises:
            DamagedStepError: a file is missing or another one.
        """
        run, directory = self.finished[step]
        folder = run.download(directory, scratch)
        record = run.metrics(directory) or run.read_json(f"{directory}/trained.json")
        if record is None:
            raise DamagedStepError(f"{run.uri}/{directory} holds no finished step; restore it")
        for name, published in record.get("files", {}).items():
            file = folder / name
            if not file.exists() or sha256(file) != published["sha256"]:
                state = "differs from what was published" if file.exists() else "is missing"
                raise DamagedStepError(
                    f"{directory}/{name} {state}; restore it, or train that step again: curlora run … --redo "
                    f"{directory.split('/')[-1].split('-')[0]}"
                )
        return folder

    # -- one step

    def _step(self, plan: StepPlan) -> None:
        """Train, save, evaluate, publish; what an earlier worker group did of it is not done again."""
        trained = self.run_directory.read_json(f"{plan.directory}/trained.json")
        if trained is None:
            self._event("step_started", plan)
            model, trained = self._learn(plan)
        else:
            self._barrier()  # all ranks have read it
            self.finished[plan.fingerprint] = (self.run_directory, plan.directory)
            model = self._attach(plan.fingerprint)
        self._stop_if_asked()
        begun = time.time()
        missing = self.assignment.missing.get(plan.directory, [])
        cells, self_test = self._evaluate(model, plan.directory, missing), self._self_test(model)
        evaluate_seconds = time.time() - begun
        held, whole = engine.local_numbers(self.base)
        self.base = self._detach(model)
        gc.collect()
        seconds = trained.pop("seconds")
        total = seconds["total"] + time.time() - begun
        metrics = {
            "fingerprint": plan.fingerprint,
            "position": plan.position,
            "tasks": list(plan.tasks),
            "parent": plan.parent,
            "parent_run": self.start.run_uri if self.start and plan.parent == self.start.fingerprint else None,
            "depth": plan.depth,
            "setting": setting(self.config),
            "data": {name: training_data_identity(self.config, name) for name in plan.tasks},
            "classes": class_names(self.config, plan.tasks),
            "cells": cells,
            **trained,
            "seconds": {
                "train": seconds["train"],
                "evaluate": evaluate_seconds,
                "overhead": total - seconds["train"] - evaluate_seconds,
                "total": total,
            },
            "peak_memory_bytes": peak_memory(self.world.device),
            "finished": time.time(),
            "environment": self._environment() | {"base_numbers_held": held, "base_numbers": whole},
            "self_test": self_test,
        }
        self._must_be_in_charge()
        if self.world.rank == 0:
            self.run_directory.write_json(f"{plan.directory}/metrics.json", metrics)
            self._event("published", plan, cells=cells, seconds=metrics["seconds"])
            self.run_directory.remove(f"{plan.directory}/trained.json")
        self._barrier()

    def _learn(self, plan: StepPlan) -> tuple[nn.Module, dict]:
        """Train a step and save what it trained; (model, what metrics.json will say of it)."""
        begun = time.time()
        parent = plan.parent if plan.parent != self.assignment.base_fingerprint else None
        model = self._attach(parent, extend=True)
        heads.train_heads(model, plan.tasks)
        counts = {
            "trainable_parameters": adapters.adapter_parameters(model),
            "head_parameters": count_head_parameters(model),
        }
        strategy = self._strategy(parent)
        resume = self._newest_checkpoint(plan)
        history = resume.values if resume else {"started": begun, "seconds": 0.0, "curve": [], "resumed_at": []}
        training = self._train(model, plan, strategy, resume, history)
        with tempfile.TemporaryDirectory() as scratch:
            saved = self._save(model, strategy, training.pop("weights"), Path(scratch), plan)
        train_seconds = training.pop("seconds")
        trained = {
            **counts,
            **saved,
            "training": training,
            "started": history["started"],
            "seconds": {"train": train_seconds, "total": history["seconds"] + time.time() - begun},
        }
        if self.world.rank == 0:
            self.run_directory.write_json(f"{plan.directory}/trained.json", trained)
            self.run_directory.remove(plan.checkpoints)
        self._barrier()
        return model, trained

    def _newest_checkpoint(self, plan: StepPlan) -> Checkpoint | None:
        """The one to go on from: rank 0 chooses, all load it."""
        found, damaged = checkpoint.newest(self.run_directory, plan) if self.world.rank == 0 else (None, [])
        for reason in damaged:
            self._event("checkpoint_skipped", plan, reason=reason)
        step = self._sum(found.step if found else 0)
        if not step:
            return None
        self._event("resumed", plan, step=step)
        return found or checkpoint.load(self.run_directory, plan, step)

    def _strategy(self, parent: str | None):
        strategy = make_strategy(self.config.strategy.name, **self.config.strategy.options)
        if parent is not None:
            with tempfile.TemporaryDirectory() as scratch:
                from safetensors.torch import load_file

                folder = self._step_files(parent, Path(scratch)) / "strategy"
                if (folder / "state.json").exists():
                    tensors = folder / "state.safetensors"
                    strategy.load_state(
                        load_file(tensors) if tensors.exists() else {}, json.loads((folder / "state.json").read_text())
                    )
        return strategy

    def _train(self, model: nn.Module, plan: StepPlan, strategy, resume: Checkpoint | None, history: dict) -> dict:
        """Train the step's tasks; what metrics.json says of it, the full trained weights and the seconds it took."""
        self.pulse.say("preparing", task=plan.label)
        begun = time.time()
        examples = self._examples(plan)
        context = TaskContext(
            plan.label,
            plan.depth,
            self.config.training.seed,
            examples,
            write=self._write_text,
            rank=self.world.rank,
            size=self.world.size,
            total=self._total,
        )
        strategy.before_task(model, context)
        if not any(p.requires_grad for p in model.parameters()):
            nothing = {"steps": 0, "tokens": 0, "tokens_per_second": 0.0, "final_loss": None, "curve": []}
            return nothing | {"resumed_at": [], "weights": {}, "seconds": time.time() - begun}
        if resume:
            strategy.load_state(resume.part("strategy"), resume.values["strategy"])
            put_weights(model, resume.part("weight"))
        steps = optimizer_steps(self.config.training, len(examples), len(plan.tasks))
        log = TrainingLog(self, plan, steps, history, resume.step if resume else 0)
        with tempfile.TemporaryDirectory() as scratch, engine.hooks_restored(model):
            trainer = self._trainer(model, examples, strategy, steps, scratch, log, resume)
            log.tokens = lambda: trainer.tokens
            with stdout_to_stderr(), self.pulse.guard():
                started = time.perf_counter()
                try:
                    trainer.train()
                except (Stopped, DivergedError):  # on all ranks: the engine can end, and the base live on
                    end_engine(trainer)
                    raise
                log.trained += time.perf_counter() - started - log.scored
            trainer.end_task(context)
            weights = self._trained_weights(model, strategy, self._learned | set(plan.tasks))
            tokens = self._sum(trainer.tokens) + (resume.values["tokens"] if resume else 0)
            end_engine(trainer)
        return {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_second": tokens / log.trained,
            "final_loss": log.points[-1][1],
            "curve": log.points,
            "resumed_at": log.resumed_at,
            "weights": weights,
            "seconds": history["seconds"] + time.time() - begun - log.scored,
        }

    def _write_text(self, model: nn.Module, rows: int, length: int) -> list[tuple[int, ...]]:
        """Sequences that the model samples by itself: for strategies, before a step is trained."""
        self.pulse.say("writing", rows=rows)
        tokenizer = self.tokenizer
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        start = next(token for token in ends if token is not None)
        forbidden = [tokenizer.pad_token_id] if tokenizer.pad_token_id not in (None, *ends[:2]) else []
        length = min(length, self.config.training.max_length, self.context)
        seed = self.config.training.seed
        with engine.ready_for_inference(model, self.settings, self.world), self.pulse.guard():
            return write_text(model, rows, length, start, seed, self.world, forbidden)

    def _examples(self, plan: StepPlan) -> Sequence[Example]:
        training = self.config.training
        length = min(training.max_length, self.context)
        tasks = [self.config.task(name) for name in plan.tasks]
        return training_examples(tasks, self.tokenizer, length, training.max_train_examples, training.seed)

    def _trainer(self, model, examples, strategy, steps: int, scratch: str, log, resume) -> ContinualTrainer:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # a process-wide singleton: a second step brings its own DeepSpeed plugin
        training = self.config.training
        arguments = training_arguments(
            training,
            steps,
            self.settings,
            scratch,
            cpu=self.world.device.type == "cpu",
            bf16=self.config.base_model.dtype == "bfloat16",
            world_size=self.world.size,
            done=resume.step if resume else 0,
        )
        return ContinualTrainer(
            model,
            arguments,
            examples,
            strategy,
            training,
            self.world,
            steps,
            on_points=log.add,
            wishes=self._wishes,
            on_checkpoint=log.keep,
            rungs=self.assignment.rungs,
            on_rung=lambda rung, take: self._rung(model, strategy, log, rung, take()),
            resume=resume,
        )

    # -- a trial's rungs

    def _rung(self, model: nn.Module, strategy, log: TrainingLog, rung: float, state: Checkpoint) -> None:
        """Score a trial in the middle of its training, keep its state, and wait for the word to go on.

        Raises:
            Stopped: the trial ends here.
        """
        begun = time.perf_counter()
        path = rung_file(rung)
        if not self._sum(int(self.world.rank == 0 and self.run_directory.exists(path))):
            with self._weights_to_judge(model, strategy):
                cells = self._evaluate(model, log.plan.directory, self.assignment.missing[log.plan.directory], True)
            if self.world.rank == 0:
                progress = {"step": log.points[-1][0], "steps": log.steps, "train_loss": log.recent_loss()}
                self.run_directory.write_json(path, {"rung": rung, "cells": cells, "time": time.time(), **progress})
        log.keep(lambda: state)
        goes_on = self._sum(int(self.world.rank == 0 and self._verdict(rung)))
        log.scored += time.perf_counter() - begun
        if not goes_on:
            raise Stopped(f"the trial ends at {rung:.0%} of its training")

    def _verdict(self, rung: float) -> bool:
        """Rank 0 waits; the others wait for it in their collective."""
        while True:
            self.pulse.beat()
            verdict = self.run_directory.read_json(verdict_file(rung))
            if verdict is not None:
                return verdict["go_on"]
            if self._asked_to_stop():
                return False
            time.sleep(QUEUE_SECONDS)

    @contextlib.contextmanager
    def _weights_to_judge(self, model: nn.Module, strategy):
        """Inside, the model has the weights that the strategy evaluates; training goes on with its own."""
        judged = strategy.evaluation_weights(model) or {}
        with swapped({name: p for name, p in model.named_parameters() if name in judged}, judged):
            yield

    def _trained_weights(self, model: nn.Module, strategy, learned: Collection[str]) -> dict[str, torch.Tensor]:
        """Full fp32 weights to publish, by parameter name, the adapter's buffers included.

        Of the heads only those of the tasks `learned` so far: the others are drawn by their names, wherever they are
        needed. Where a strategy evaluates other weights than it trained, those are put into the model too.
        """
        prefix = adapters.adapter_prefix(model)
        chosen = {
            name: p
            for name, p in model.named_parameters()
            if (prefix in name or heads.task_of(name) in learned) and "ds_" not in name
        }
        replacement = strategy.evaluation_weights(model)
        if replacement:
            for name, tensor in replacement.items():
                with writable(chosen[name]):
                    chosen[name].data.copy_(tensor)
        weights = engine.gathered_copy(chosen)
        buffers = {name: b.detach().cpu().clone() for name, b in model.state_dict().items() if prefix in name}
        return {**{name: b for name, b in buffers.items() if name not in chosen}, **weights}

    def _save(self, model, strategy, weights: dict, scratch: Path, plan: StepPlan) -> dict:
        """Upload adapter, heads and strategy state; the adapter's bytes and every file's digest (rank 0)."""
        saved: dict = {"adapter_bytes": 0, "files": {}}
        tensors, values = strategy.state()
        self._must_be_in_charge()
        if self.world.rank == 0:
            if weights:
                saved["adapter_bytes"] = adapters.save_adapter(model, weights, scratch)
            if tensors or values:
                from safetensors.torch import save_file

                (scratch / "strategy").mkdir()
                save_file(tensors, scratch / "strategy" / "state.safetensors")
                (scratch / "strategy" / "state.json").write_text(json.dumps(values))
            for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
                identity = {"bytes": file.stat().st_size, "sha256": sha256(file)}
                saved["files"][file.relative_to(scratch).as_posix()] = identity
            self.run_directory.upload(scratch, plan.directory)
        self._barrier()
        return saved

    # -- stopping

    def _wishes(self) -> Wishes:
        """Asked at every look of the trainer, on every rank."""
        self._looks += 1
        notice = self._looks % NOTICE_LOOKS == 0 and node_is_leaving(self.world)
        if self.world.rank != 0:
            return Wishes(checkpoint=notice)
        due = time.monotonic() - self._kept >= self.config.durability.checkpoint_seconds
        return Wishes(checkpoint=due or notice, stop=self._asked_to_stop())

    def _asked_to_stop(self) -> bool:
        """Whether somebody wants the run to stop, or another driver is in charge of it now (rank 0)."""
        if time.monotonic() - self._asked < ASK_SECONDS:
            return False
        self._asked = time.monotonic()
        return self.run_directory.stop_requested() is not None or not self._in_charge()

    def _stop_if_asked(self) -> None:
        """Between two parts of the work; every rank must call it."""
        stop = self.world.rank == 0 and (self.run_directory.stop_requested() is not None or not self._in_charge())
        if self._sum(int(stop)):
            raise Stopped("stopped between two steps")

    def _in_charge(self) -> bool:
        uri = self.assignment.lease_uri
        lease = (RunDirectory(uri) if uri else self.run_directory).read_json("lease.json")
        return not self.assignment.lease or (lease is not None and lease["token"] == self.assignment.lease)

    def _must_be_in_charge(self) -> None:
        """Raises Stopped on every rank if another driver has taken over: this one must not publish any more."""
        if self._sum(int(self.world.rank == 0 and not self._in_charge())):
            raise Stopped("another driver has taken over this run")

    # -- evaluation

    def _evaluate(self, model: nn.Module, directory: str, names: list[str], training: bool = False) -> list[dict]:
        """Score the named sets, write their predictions; the cells on rank 0.

        Args:
            training: the model is in its training engine, through which it can be called.

        Raises:
            DivergedError: a score is not a number.
        """
        cells: list[dict] = []
        for name in names:
            self._set(name)  # reading and encoding may take long; only what follows is guarded
        ready = contextlib.nullcontext() if training else engine.ready_for_inference(model, self.settings, self.world)
        with ready, self.pulse.guard():
            for name in names:
                self.pulse.say("evaluating", directory=directory, name=name)
                result = evaluate(
                    model,
                    self._set(name),
                    self.world,
                    self.config.evaluation.batch_tokens,
                    role="task" if name in {task.name for task in self.config.tasks} else "retention",
                    key=self.assignment.cell_keys[name],
                )
                if result is not None:
                    cell, outcomes = result
                    cells.append(cell.to_json())
                    lines = "".join(json.dumps(outcome) + "\n" for outcome in outcomes)
                    self.run_directory.write_bytes(f"{directory}/predictions/{name}.jsonl", lines.encode())
        bad = [cell["name"] for cell in cells if not is_finite(cell)]
        if self._sum(len(bad)):  # rank 0 knows, all must hear
            raise DivergedError(
                f"the score of {', '.join(bad) or 'a set'} is not finite; lower training.learning_rate or "
                "training.max_grad_norm"
            )
        return cells

    def _set(self, name: str) -> EvaluationSet:
        key = self.assignment.cell_keys[name]
        if key not in self._encoded:
            source = next(s for s in [*self.config.tasks, *self.config.retention] if s.name == name)
            self._encoded[key] = evaluation_set(source, self.tokenizer, self.config, self.context)
        return self._encoded[key]

    def _self_test(self, model: nn.Module) -> dict:
        """A few logits as this worker computes them: whoever loads the adapter later can check that it is the same."""
        text = (self.config.retention or self.config.tasks)[0]
        ids = next(iter(self._set(text.name).items)).input_ids[:SELF_TEST_TOKENS]
        with engine.ready_for_inference(model, self.settings, self.world), torch.no_grad():
            model.eval()
            batch = torch.as_tensor(ids, device=self.world.device)[None]
            logits = model(input_ids=batch, use_cache=False).logits[0, -1, :SELF_TEST_LOGITS]
        return {"input_ids": [int(i) for i in ids], "last_logits": [float(v) for v in logits]}

    # -- small things

    def _event(self, kind: str, plan: StepPlan | None, **fields) -> None:
        if self.world.rank == 0:
            self.run_directory.event(kind, **(step_identity(plan) if plan else {}), **fields)

    def _barrier(self) -> None:
        if self.world.size > 1:
            torch.distributed.barrier(group=self.world.group)

    def _sum(self, value: int) -> int:
        return int(self._total(torch.tensor(value, dtype=torch.int64)))

    def _total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a CPU tensor over the ranks."""
        if self.world.size > 1:
            torch.distributed.all_reduce(tensor, group=self.world.group)
        return tensor

    def _environment(self) -> dict:
        return environment.describe(self.world.size, zero_settings.stage_of(self.settings), self.world.device.type)
