"""What one Ray Train worker does: for each step of its segment model, adapter, train, evaluate, publish.

The base is loaded once for the whole segment. A step starts from its parent's *published* adapter, so a segment of
one step and a segment of ten give the same bits. Everything that leaves a worker goes into the run directory; rank 0
writes it, `metrics.json` last.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import logging
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from curlora.continual import TaskContext, make_strategy
from pipelines import adapters, engine, heads
from pipelines.config import ClassificationTask, PipelineConfig
from pipelines.data import evaluation_set, training_examples
from pipelines.evaluation import World, evaluate
from pipelines.kinds import EvaluationSet, kind_of
from pipelines.runs import RunDirectory, StepPlan
from pipelines.sources import digest_of, load_split
from pipelines.trainer import ContinualTrainer, DivergedError, optimizer_steps, training_arguments

PROGRESS_SECONDS = 1.0
SELF_TEST_TOKENS = 32
SELF_TEST_LOGITS = 64


@dataclass(frozen=True)
class Assignment:
    """One segment, as the driver hands it to the workers (plain JSON on the way)."""

    run_uri: str
    config: dict
    steps: tuple[StepPlan, ...]
    base_directory: str
    base_fingerprint: str
    missing: dict[str, list[str]]  # step directory → names of the cells to evaluate
    cell_keys: dict[str, str]
    verbose: bool = False

    def to_json(self) -> dict:
        return self.__dict__ | {"steps": [step.to_json() for step in self.steps]}

    @classmethod
    def from_json(cls, raw: dict) -> Assignment:
        return cls(**(raw | {"steps": tuple(StepPlan.from_json(step) for step in raw["steps"])}))


def train_steps(raw: dict) -> dict:
    """Entry point of a Ray Train worker. Returns the world it ran in (rank 0's value reaches the driver)."""
    assignment = Assignment.from_json(raw)
    _quiet(assignment.verbose)
    try:
        worker = Worker(assignment)
        worker.run()
    except Exception as error:
        if is_permanent(error):
            # Ray would start the worker group again, for the same error
            text = f"{type(error).__name__}: {error}"
            RunDirectory(assignment.run_uri).event("worker_error", error=text, traceback=traceback.format_exc())
        raise
    return {"world_size": worker.world.size}


def is_permanent(error: Exception) -> bool:
    """Whether trying again cannot help. A lost peer shows as a RuntimeError of the collective operation it left."""
    if isinstance(error, DivergedError | torch.OutOfMemoryError):
        return True
    return not isinstance(error, RuntimeError | OSError)


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
    """State of one worker over the steps of its segment."""

    def __init__(self, assignment: Assignment):
        self.assignment = assignment
        self.begun = time.time()
        self.config = PipelineConfig.model_validate(assignment.config)
        self.run_directory = RunDirectory(assignment.run_uri)
        engine.prepare_environment()
        self.world = _world(engine.deepspeed_settings(self.config.deepspeed))
        self.settings = engine.complete_settings(self.config, self.world.size)
        self.finished = self.run_directory.finished_steps()
        self.base, self.tokenizer = self._load_base()
        self.context = int(getattr(self.base.config, "max_position_embeddings", None) or 1024)
        self.sets: dict[str, EvaluationSet] = {}
        self.classes = {
            task.name: len(kind_of(task).classes(task))
            for task in self.config.tasks
            if isinstance(task, ClassificationTask) and task.head == "classifier"
        }

    # -- set-up

    def _load_base(self) -> tuple[nn.Module, object]:
        import transformers
        from transformers.integrations import HfDeepSpeedConfig

        # under ZeRO-3 this object makes from_pretrained load shards only; it must stay referenced
        self._partitioning = HfDeepSpeedConfig(self.settings) if engine.stage_of(self.settings) == 3 else None
        base = self.config.base_model
        options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
        with _stdout_to_stderr():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                base.path, dtype=getattr(torch, base.dtype), **options
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.path, **options)
        model.requires_grad_(False)
        model.config.use_cache = False
        return model if self._partitioning else model.to(self.world.device), tokenizer

    # -- the segment

    def run(self) -> None:
        self._evaluate_finished()
        for plan in self.assignment.steps:
            if self.run_directory.metrics(plan.directory) is None:
                self._step(plan)
            self.finished[plan.fingerprint] = plan.directory

    def _evaluate_finished(self) -> None:
        """Row 0, and cells that finished steps lack (a task or a corpus was added later)."""
        for directory, names in self.assignment.missing.items():
            begun = time.time()
            metrics = self.run_directory.metrics(directory)
            if metrics is None and directory == self.assignment.base_directory:
                metrics = self._base_metrics()
            if metrics is None or not names:
                continue  # a step that is still to be trained brings its own row
            model = self._model_of(metrics)
            cells = self._evaluate(model, directory, names)
            self.base = adapters.detach_adapter(model)
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
            "fingerprint": self.assignment.base_fingerprint,
            "position": 0,
            "tasks": [],
            "parent": None,
            "cells": [],
            "seconds": {"train": 0.0, "evaluate": 0.0, "overhead": 0.0, "total": 0.0},
            "peak_memory_bytes": _peak_memory(self.world.device),
            "started": self.begun,
            "finished": time.time(),
            "environment": self._environment(),
        }

    def _model_of(self, metrics: dict) -> nn.Module:
        """The model as a finished step left it (the bare base for row 0)."""
        if metrics["position"] == 0:
            heads.attach_heads(self.base, self.classes, self.config.training.seed)
            return self.base
        return self._attach(metrics["fingerprint"])

    def _attach(self, parent: str | None) -> nn.Module:
        """Base, adapter and heads: those of the step `parent`, or new ones."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = None
            if parent is not None:
                folder = self.run_directory.download(self.finished[parent], Path(scratch))
            carried = folder / "adapter" if folder and self.config.adapter.carry == "continue" else None
            if carried is not None and not carried.exists():
                carried = None  # adapter: none has no file
            model = adapters.attach_adapter(self.base, self.config.adapter, self.config.training.seed, carried)
            heads.attach_heads(model, self.classes, self.config.training.seed)
            if folder and (folder / "heads.safetensors").exists():
                from safetensors.torch import load_file

                heads.load_heads(model, load_file(folder / "heads.safetensors"))
        return model if engine.is_partitioned(model) else model.to(self.world.device)

    # -- one step

    def _step(self, plan: StepPlan) -> None:
        begun = time.time()
        self._event("step_started", plan)
        parent = plan.parent if plan.parent != self.assignment.base_fingerprint else None
        model = self._attach(parent)
        heads.train_heads(model, plan.tasks)
        counts = {
            "trainable_parameters": adapters.adapter_parameters(model),
            "head_parameters": _head_parameters(model),
        }
        strategy = self._strategy(parent)
        train_begun = time.time()
        trained = self._train(model, plan, strategy)
        train_seconds = time.time() - train_begun
        with tempfile.TemporaryDirectory() as scratch:
            adapter_bytes = self._save(model, strategy, trained.pop("weights"), Path(scratch), plan)
        evaluate_begun = time.time()
        missing = self.assignment.missing.get(plan.directory, [])
        cells, self_test = self._evaluate(model, plan.directory, missing), self._self_test(model)
        evaluate_seconds = time.time() - evaluate_begun
        held, whole = engine.local_numbers(self.base)
        self.base = adapters.detach_adapter(model)
        gc.collect()
        total = time.time() - begun
        metrics = {
            "fingerprint": plan.fingerprint,
            "position": plan.position,
            "tasks": list(plan.tasks),
            "parent": plan.parent,
            "setting": setting(self.config),
            "data": {name: _data_identity(self.config, name) for name in plan.tasks},
            "cells": cells,
            **counts,
            "adapter_bytes": adapter_bytes,
            "training": trained,
            "seconds": {
                "train": train_seconds,
                "evaluate": evaluate_seconds,
                "overhead": total - train_seconds - evaluate_seconds,
                "total": total,
            },
            "peak_memory_bytes": _peak_memory(self.world.device),
            "started": begun,
            "finished": time.time(),
            "environment": self._environment() | {"base_numbers_held": held, "base_numbers": whole},
            "self_test": self_test,
        }
        if self.world.rank == 0:
            self.run_directory.write_json(f"{plan.directory}/metrics.json", metrics)
            self._event("published", plan, cells=cells, seconds=metrics["seconds"])
        self._barrier()

    def _strategy(self, parent: str | None):
        strategy = make_strategy(self.config.strategy.name, **self.config.strategy.options)
        if parent is not None:
            with tempfile.TemporaryDirectory() as scratch:
                from safetensors.torch import load_file

                folder = self.run_directory.download(self.finished[parent], Path(scratch)) / "strategy"
                if (folder / "state.json").exists():
                    tensors = folder / "state.safetensors"
                    strategy.load_state(
                        load_file(tensors) if tensors.exists() else {}, json.loads((folder / "state.json").read_text())
                    )
        return strategy

    def _train(self, model: nn.Module, plan: StepPlan, strategy) -> dict:
        """Train the step's tasks; returns what metrics.json says of it, and the full trained weights."""
        training = self.config.training
        tasks = [self.config.task(name) for name in plan.tasks]
        max_length = min(training.max_length, self.context)
        examples = training_examples(tasks, self.tokenizer, max_length, training.max_train_examples, training.seed)
        context = TaskContext(plan.label, plan.position, training.seed, examples)
        strategy.before_task(model, context)
        if not any(p.requires_grad for p in model.parameters()):
            return {"steps": 0, "tokens": 0, "tokens_per_second": 0.0, "final_loss": None, "curve": [], "weights": {}}
        steps = optimizer_steps(training, len(examples))
        curve = _Curve(self, plan, steps)
        with tempfile.TemporaryDirectory() as scratch, engine.hooks_restored(model):
            trainer = self._trainer(model, examples, strategy, steps, scratch, curve)
            curve.tokens = lambda: trainer.tokens
            with _stdout_to_stderr():
                begun = time.perf_counter()
                trainer.train()
                seconds = time.perf_counter() - begun
            strategy.after_task(trainer.model, context)
            weights = self._trained_weights(model, strategy)
            tokens = self._sum(trainer.tokens)
            _end(trainer)
        curve.flush()
        return {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "final_loss": curve.points[-1][1],
            "curve": curve.points,
            "weights": weights,
        }

    def _trainer(self, model, examples, strategy, steps: int, scratch: str, curve) -> ContinualTrainer:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # a process-wide singleton: a second step brings its own DeepSpeed plugin
        arguments = training_arguments(
            self.config.training,
            steps,
            self.settings,
            scratch,
            cpu=self.world.device.type == "cpu",
            bf16=self.config.base_model.dtype == "bfloat16",
            world_size=self.world.size,
        )
        return ContinualTrainer(model, arguments, examples, strategy, self.config.training, self.world, curve.add)

    def _trained_weights(self, model: nn.Module, strategy) -> dict[str, torch.Tensor]:
        """Full fp32 weights to publish, by parameter name, the adapter's buffers included.

        Where a strategy evaluates other weights than it trained, those are put into the model too.
        """
        prefix = adapters.adapter_prefix(model)
        chosen = {
            name: p
            for name, p in model.named_parameters()
            if (prefix in name or heads.saved_name(name) is not None) and "ds_" not in name
        }
        replacement = strategy.evaluation_weights(model)
        if replacement:
            for name, tensor in replacement.items():
                with _writable(chosen[name]):
                    chosen[name].data.copy_(tensor)
        weights = engine.gathered_copy(chosen)
        buffers = {name: b.detach().cpu().clone() for name, b in model.state_dict().items() if prefix in name}
        return {**{name: b for name, b in buffers.items() if name not in chosen}, **weights}

    def _save(self, model, strategy, weights: dict, scratch: Path, plan: StepPlan) -> int:
        """Upload adapter, heads and strategy state; returns the adapter's bytes."""
        size = 0
        if self.world.rank == 0:
            size = adapters.save_adapter(model, weights, scratch) if weights else 0
            tensors, values = strategy.state()
            if tensors or values:
                from safetensors.torch import save_file

                (scratch / "strategy").mkdir()
                save_file(tensors, scratch / "strategy" / "state.safetensors")
                (scratch / "strategy" / "state.json").write_text(json.dumps(values))
            self.run_directory.upload(scratch, plan.directory)
        self._barrier()
        return size

    # -- evaluation

    def _evaluate(self, model: nn.Module, directory: str, names: list[str]) -> list[dict]:
        """Score the named sets, write their predictions; the cells on rank 0."""
        cells: list[dict] = []
        with engine.ready_for_inference(model, self.settings, self.world):
            for name in names:
                self._event("evaluating", None, directory=directory, name=name)
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
        return cells

    def _set(self, name: str) -> EvaluationSet:
        if name not in self.sets:
            source = next(s for s in [*self.config.tasks, *self.config.retention] if s.name == name)
            self.sets[name] = evaluation_set(source, self.tokenizer, self.config, self.context)
        return self.sets[name]

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
            step = {"fingerprint": plan.fingerprint, "task": plan.label, "position": plan.position} if plan else {}
            self.run_directory.event(kind, **step, **fields)

    def _barrier(self) -> None:
        if self.world.size > 1:
            torch.distributed.barrier(group=self.world.group)

    def _sum(self, value: int) -> int:
        total = torch.tensor(value, dtype=torch.int64)
        if self.world.size > 1:
            torch.distributed.all_reduce(total, group=self.world.group)
        return int(total)

    def _environment(self) -> dict:
        packages = ("torch", "transformers", "peft", "deepspeed", "ray", "datasets")
        return {name: importlib.metadata.version(name) for name in packages} | {
            "python": sys.version.split()[0],
            "world_size": self.world.size,
            "deepspeed_stage": engine.stage_of(self.settings),
            "device": str(self.world.device.type),
        }


class _Curve:
    """The training curve of one step; tells the run directory about it once a second."""

    def __init__(self, worker: Worker, plan: StepPlan, steps: int):
        self.worker, self.plan, self.steps = worker, plan, steps
        self.points: list[list[float]] = []
        self.sent = 0
        self.tokens: Callable[[], int] = lambda: 0  # of this rank, so far
        self.last = self.begun = time.time()

    def add(self, points: list[tuple[int, float, float, float]]) -> None:
        self.points += [list(point) for point in points]
        if time.time() - self.last >= PROGRESS_SECONDS or self.sent == 0:
            self.flush()

    def flush(self) -> None:
        if self.sent < len(self.points):
            step, loss, _, _ = self.points[-1]
            elapsed = max(time.time() - self.begun, 1e-9)
            speed = self.worker.world.size * self.tokens() / elapsed
            progress = {"step": step, "steps": self.steps, "loss": loss, "elapsed": elapsed}
            self.worker._event("training", self.plan, **progress, tokens_per_second=speed)
            self.sent, self.last = len(self.points), time.time()


def setting(config: PipelineConfig) -> dict:
    """What makes a step's training: recorded with it, and part of its fingerprint."""
    return {
        "adapter": config.adapter.model_dump(),
        "strategy": config.strategy.model_dump(),
        "training": config.training.model_dump(),
    }


def _data_identity(config: PipelineConfig, name: str) -> dict:
    task = config.task(name)
    return {"train": {"digest": digest_of(task, "train"), "rows": len(load_split(task, "train"))}}


def _world(settings: dict) -> World:
    """This process's place among the workers of a Ray Train run (or alone)."""
    if not torch.distributed.is_initialized():
        return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    import ray.train.torch

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return World(
        rank=rank,
        size=size,
        device=ray.train.torch.get_device(),
        lockstep=engine.stage_of(settings) == 3,
        group=torch.distributed.new_group(backend="gloo"),  # objects travel over gloo also where tensors use NCCL
    )


def _end(trainer: ContinualTrainer) -> None:
    """Give back what the engine holds; the model stays."""
    trainer.model_wrapped.destroy()
    trainer.accelerator.free_memory()
    trainer.model.zero_grad(set_to_none=True)


def _head_parameters(model: nn.Module) -> int:
    return sum(
        getattr(p, "ds_numel", p.numel()) for head in heads.trainable_heads(model).values() for p in head.parameters()
    )


def _peak_memory(device: torch.device) -> int:
    """Bytes: this process's peak resident set, or the peak allocated on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _writable(parameter: nn.Parameter):
    """A parameter that can be written as a whole, also when partitioned."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield
    else:
        yield


@contextlib.contextmanager
def _stdout_to_stderr():
    """Some libraries print progress to stdout, which belongs to the user's own pipes."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
