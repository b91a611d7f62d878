"""The base model that stays in a worker's memory while adapters and heads are attached and detached."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from pipelines.config.sections import AdapterConfig, BaseModelConfig
from pipelines.config.tasks import ClassificationTask
from pipelines.data.benchmarks import LoadedBenchmark, load_benchmark
from pipelines.data.kinds import kind_of
from pipelines.data.kinds.base import EvaluationSet
from pipelines.data.sets import evaluation_set
from pipelines.distributed import engine, sparse
from pipelines.distributed.world import World
from pipelines.models import adapters, heads
from pipelines.models.bank import Bank
from pipelines.models.base import context_length, load_base, load_tokenizer
from pipelines.runs.identity import fingerprint
from pipelines.runs.step_record import StepRecord
from pipelines.workers.context import WorkContext
from pipelines.workers.failures import DamagedStepError


class ResidentModel:
    """A base model that stays loaded across assignments with the same base.

    Attributes:
        base: the frozen base; None before the first assignment.
        learned: tasks with a trained head in the step that was attached last.
        context: context length of the base in tokens.
    """

    def __init__(self) -> None:
        self.base: nn.Module | None = None
        self.tokenizer = None
        self.context = 0
        self.learned: frozenset[str] = frozenset()
        self.work: WorkContext | None = None
        self._loaded: str | None = None  # identity of the base that is loaded
        self._adapted: nn.Module | None = None  # the base with an adapter attached
        self._classes: dict[str, int] = {}  # task → classes of its head
        self._encoded: dict[str, EvaluationSet] = {}  # by cell key, kept across assignments with this base
        self._benchmarks: dict[str, LoadedBenchmark] = {}  # by cell key
        self._partitioning = None

    def prepare(self, work: WorkContext) -> None:
        """Load the base of an assignment unless it is already loaded."""
        self.work = work
        identity = fingerprint([work.config.base_model.model_dump(), work.world.lockstep])
        if self._loaded != identity:
            self.base = None  # before the next one is loaded
            self._encoded.clear()
            loaded = load_frozen_base(work.config.base_model, work.settings, work.world)
            self.base, self.tokenizer, self._partitioning = loaded
            self._loaded = identity
        work.heartbeat.watch(self.base)
        self.context = context_length(self.base.config)
        self._classes = {
            task.name: len(kind_of(task).classes(task))
            for task in work.config.tasks
            if isinstance(task, ClassificationTask) and task.head == "classifier"
        }
        if work.start:
            self._classes = self._inherited_heads() | self._classes

    def forget(self) -> None:
        """Drop the base, whatever its state: the next assignment reloads it."""
        self.base = self._loaded = self._adapted = None
        gc.collect()

    def release(self) -> None:
        """End of an assignment: forget an adapted model that an error left behind."""
        self._adapted = None

    # -- attaching and detaching adapters

    def attach(self, step: str | None, extend: bool = False, adapter: AdapterConfig | None = None) -> nn.Module:
        """Base with adapter and heads: of a step (its fingerprint), or new ones; `extend` prepares the next task."""
        work, seed = self.work, self.work.config.training.seed
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.step_files(step, Path(scratch)) if step else None
            carried = folder / "adapter" if folder else None
            if carried is not None and not carried.exists():
                carried = None  # `adapter: none` saves no file
            model = adapters.attach_adapter(self.base, adapter or work.config.adapter, seed, carried, extend)
            self._adapted = model
            heads.attach_heads(model, self._classes, seed)
            self.learned = frozenset()
            if folder and (folder / "heads.safetensors").exists():
                saved = load_file(folder / "heads.safetensors")
                heads.load_heads(model, saved)
                self.learned = frozenset(name.rpartition(".")[0] for name in saved)
            bank = Bank.load(folder) if folder and not extend else None
            if bank:
                bank.attach(model)
        return model if engine.is_partitioned(model) else model.to(work.world.device)

    def bank(self, step: str) -> Bank | None:
        """The bank of a finished step, given by fingerprint; None if it has none."""
        with tempfile.TemporaryDirectory() as scratch:
            return Bank.load(self.step_files(step, Path(scratch)))

    def detach(self, model: nn.Module | None = None) -> None:
        """Remove the adapter from `model` (default: the model attached last); the bare base stays."""
        model = self._adapted if model is None else model
        self._adapted = None
        if model is not None:
            self.base = adapters.detach_adapter(model)

    def of_step(self, metrics: StepRecord) -> nn.Module:
        """The model after a finished step (row 0: the step that the chain starts from, or the bare base)."""
        if metrics.position == 0 and self.work.start is None:
            heads.attach_heads(self.base, self._classes, self.work.config.training.seed)
            return self.base
        # a search may have changed the adapter between steps; row 0 has no setting
        trained_as = AdapterConfig.model_validate(metrics.setting.adapter) if metrics.setting else None
        return self.attach(metrics.fingerprint, adapter=trained_as)

    # -- evaluation sets and step files

    def evaluation_set(self, name: str) -> EvaluationSet:
        """The encoded evaluation set of a task or corpus, cached across steps."""
        work = self.work
        key = work.assignment.cell_keys[name]
        if key not in self._encoded:
            source = next(s for s in [*work.config.tasks, *work.config.corpora] if s.name == name)
            self._encoded[key] = evaluation_set(source, self.tokenizer, work.config, self.context)
        return self._encoded[key]

    def benchmark(self, name: str) -> LoadedBenchmark | None:
        """The tasks of a benchmark, cached across steps; None if the name is that of a task or corpus."""
        found = next((benchmark for benchmark in self.work.config.benchmarks if benchmark.name == name), None)
        if found is None:
            return None
        key = self.work.assignment.cell_keys[name]
        if key not in self._benchmarks:
            self._benchmarks[key] = load_benchmark(found)
        return self._benchmarks[key]

    def _inherited_heads(self) -> dict[str, int]:
        """Task → number of classes of the heads that the chain starts with, even of tasks not in the configuration."""
        with tempfile.TemporaryDirectory() as scratch:
            file = self.step_files(self.work.start.fingerprint, Path(scratch)) / "heads.safetensors"
            if not file.exists():
                return {}
            with safe_open(file, "pt") as saved:
                names = [name for name in saved.keys() if name.endswith(".weight")]  # noqa: SIM118
                return {name.removesuffix(".weight"): saved.get_slice(name).get_shape()[0] for name in names}

    def step_files(self, step: str, scratch: Path) -> Path:
        """A local folder with the verified files of a step, given by fingerprint.

        Raises:
            DamagedStepError: a file is missing or differs from the published one.
        """
        run, directory = self.work.finished[step]
        folder = run.download(directory, scratch)
        record = run.metrics(directory) or run.trained(directory)
        if record is None:
            raise DamagedStepError(f"{run.uri}/{directory} holds no finished step; restore it")
        for name, published in (record.files or {}).items():
            file = folder / name
            if not file.exists() or sha256(file) != published.sha256:
                state = "differs from what was published" if file.exists() else "is missing"
                raise DamagedStepError(
                    f"{directory}/{name} {state}; restore it, or train the step again: curlora run … --redo "
                    f"{directory.split('/')[-1].split('-')[0]}"
                )
        return folder


def load_frozen_base(base: BaseModelConfig, settings: dict, world: World) -> tuple[nn.Module, object, object]:
    """The base without gradients, its tokenizer, and an object that must stay referenced while the model lives: under
    ZeRO-3 (`world.lockstep`) it makes Transformers load shards only."""
    from transformers.integrations import HfDeepSpeedConfig  # imports DeepSpeed, after its environment is set
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # left by an earlier base under ZeRO-3: Transformers would partition this one, too
    partitioning = HfDeepSpeedConfig(settings) if world.lockstep else None
    returned = engine.freed_memory_returned() if partitioning else contextlib.nullcontext()
    with stdout_to_stderr(), returned:
        model = load_base(base, None if partitioning else world.device)
    model.requires_grad_(False)
    model.config.use_cache = False
    if partitioning:
        sparse.gather_experts_together(model)
    return model, load_tokenizer(base), partitioning


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def stdout_to_stderr():
    """Redirects the progress that some libraries print to stdout: that is for the command's own output."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
