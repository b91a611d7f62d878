"""The YAML configuration of a run as pydantic models, with every rule about it.

`load_config` turns a file and `--set` overrides into a `PipelineConfig` or raises one `ConfigError` that lists *all*
problems, each with the field, the value found and the remedy. Nothing here touches data, models or a cluster.
"""

from __future__ import annotations

import difflib
import os
import re
import string
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
FIELD_NAME = re.compile(r"[^\W\d][\w\- ]*")
DURATION = re.compile(r"(\d+(?:\.\d+)?) *([smhd]?)")
VARIABLE = re.compile(r"\$\{?(\w+)\}?")
SELECTION_RULES = ("inverse", "uniform", "importance", "leverage", "deim", "activation")
STRATEGIES = ("sequential", "replay", "rehearsal", "ilora", "coma", "lwf", "clora", "ewc", "olora", "joint")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input: where, and what to do."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class ConfigError(ValueError):
    """Bad input. Carries every problem found; the command line prints one line each and exits with 2."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of `valid`, or the list of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(valid)}"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class BaseModelConfig(Section):
    """The frozen base model."""

    path: str = Field(description="local folder or hub id of a causal language model")
    revision: str | None = Field(None, description="hub revision")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the frozen weights")
    quantization: Literal["8bit", "4bit"] | None = Field(
        None, description="8bit (LLM.int8) | 4bit (NF4) by bitsandbytes, frozen; dtype is what it computes in"
    )
    trust_remote_code: bool = Field(False, description="run model code that comes with the weights")
    architecture: dict[str, Any] | None = Field(
        None, description="the base's config.json, inline: lets --dry-run work where the hub is out of reach"
    )


class AdapterConfig(Section):
    """What trains. `curlora` has fields of its own; `options` goes to any other PEFT type unchanged."""

    type: str = Field("curlora", description="curlora | none (heads only) | lora | any PEFT type installed")
    r: int = Field(23, gt=0, description="rank")
    alpha: float = Field(1.0, gt=0, description="scale of the update (lora: lora_alpha)")
    target_modules: str | list[str] = Field("all-linear", description="module name suffixes, or all-linear")
    selection: str = Field("inverse", description="rule that samples rows and columns")
    whiten: bool = Field(True, description="train U between orthonormal factors")
    scale: Literal["adam", "rsqrt", "none"] = Field("adam", description="scale of whitened factors")
    carry: Literal["continue", "stack", "fresh"] = Field(
        "continue",
        description="continue: the same adapter through all tasks; stack: a new block a task beside the frozen old "
        "ones (curlora, lora); fresh: a new adapter for every task",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further fields of the PEFT config")

    @field_validator("selection")
    @classmethod
    def _known_selection(cls, value: str) -> str:
        if value not in SELECTION_RULES:
            raise ValueError(f"unknown selection rule '{value}', {did_you_mean(value, SELECTION_RULES)}")
        return value


class StrategyConfig(Section):
    """How training protects earlier tasks. Options other than the name belong to the strategy."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "sequential"

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"unknown strategy '{value}', {did_you_mean(value, STRATEGIES)}")
        return value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class TrainingConfig(Section):
    learning_rate: float = Field(3.0e-3, gt=0)
    head_learning_rate: float = Field(1.0e-2, gt=0)
    epochs: float = Field(3, gt=0)
    max_steps: int | None = Field(None, gt=0, description="optimizer steps a task; overrides epochs")
    batch_size: int = Field(16, gt=0, description="examples an optimizer step, over all workers")
    gradient_accumulation: int = Field(1, gt=0, description="micro-batches an optimizer step")
    max_length: int = Field(128, ge=8, description="tokens a sequence")
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 turns it off")
    seed: int = Field(0, ge=0)
    gradient_checkpointing: bool = False
    max_train_examples: int | None = Field(None, gt=0, description="seeded subset of each task's training split")

    @model_validator(mode="after")
    def _micro_batches(self):
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation "
                f"{self.gradient_accumulation}; choose a multiple"
            )
        return self


class EvaluationConfig(Section):
    max_examples: int | None = Field(None, gt=0, description="seeded subset of each test split")
    max_retention_tokens: int | None = Field(None, gt=0, description="the beginning of each retention corpus")
    seed: int = Field(0, ge=0, description="of the subset; the same rows under every training seed")
    batch_tokens: int = Field(8192, gt=0, description="padded tokens a forward pass")
    earlier_every: int = Field(
        1, gt=0, description="earlier tasks are scored after every so many steps, and at the end"
    )


class ResourcesConfig(Section):
    workers: int = Field(2, gt=0)
    gpus_per_worker: float | Literal["auto"] = Field("auto", description="auto: 1 where the cluster has GPUs")
    cpus_per_worker: float = Field(1, gt=0)

    @field_validator("gpus_per_worker")
    @classmethod
    def _not_negative(cls, value):
        if value != "auto" and value < 0:
            raise ValueError(f"{value} is negative; use auto, 0 or a positive number")
        return value


class Source(Section):
    """Where rows come from: a folder with `{train,validation,test}.<format>`, a file, a hub id or any fsspec URI.

    Formats: jsonl, json, csv, tsv, parquet, txt (see pipelines/sources.py).
    """

    name: str
    data: str
    subset: str | None = Field(None, description="configuration name of a hub dataset")
    revision: str | None = Field(None, description="revision of a hub dataset")

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        return check_name(value)


class TaskSource(Source):
    """A task of the sequence. Its behaviour lies in pipelines/kinds, one file a kind."""

    SOURCE_FIELDS: ClassVar = frozenset({"data", "subset", "revision"})
    SCORING_FIELDS: ClassVar = frozenset({"metric", "max_new_tokens", "normalization"})

    splits: dict[Literal["train", "validation", "test"], str] = Field(
        default_factory=dict, description="split expression for each part, e.g. {test: 'validation[:500]'}"
    )

    def training_identity(self) -> dict:
        """The fields that shape training; where the data lies does not count, its digest does."""
        return self.model_dump(exclude=set(self.SOURCE_FIELDS | self.SCORING_FIELDS))

    def scoring_identity(self) -> dict:
        """The fields that shape a score."""
        return self.model_dump(exclude=set(self.SOURCE_FIELDS))


class ClassificationTask(TaskSource):
    kind: Literal["classification"]
    head: Literal["classifier", "verbalizer"] = "classifier"
    text: str | list[str] = Field("text", description="field(s) that hold the text; several are joined by newlines")
    label: str = "label"
    labels: list[str] | dict[int, str] | None = Field(
        None, description="class names by position, or by label value; default: labels.json beside the data"
    )
    prompt: str | None = Field(None, description="verbalizer: template with {field} names; the label text follows")
    verbalizer: list[str] | None = Field(None, description="text of each label, in order; default: the class names")
    metric: Literal["accuracy", "macro_f1"] = "accuracy"

    @field_validator("prompt")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        return check_template(value)

    @model_validator(mode="after")
    def _prompt_belongs_to_verbalizer(self):
        if self.head == "verbalizer" and not self.prompt:
            raise ValueError("head 'verbalizer' needs a prompt, e.g. prompt: \"Review: {sentence}\\nSentiment:\"")
        if self.head == "classifier" and (self.prompt or self.verbalizer):
            raise ValueError("prompt and verbalizer belong to head 'verbalizer'; remove them or set head: verbalizer")
        return self

    @property
    def text_fields(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else list(self.text)


class LanguageModelingTask(TaskSource):
    kind: Literal["language-modeling"]
    text: str = "text"
    documents: Literal["separate", "joined"] = Field(
        "separate", description="separate: no token sees another document; joined: one stream with end tokens between"
    )

    @property
    def metric(self) -> str:
        return "nll"


class GenerationTask(TaskSource):
    """Prompt and completion as templates, or one field with chat messages whose last one is the completion."""

    kind: Literal["generation"]
    prompt: str | None = Field(None, description="template with {field} names")
    completion: str | None = Field(None, description="template of the answer, e.g. '{answer}'")
    messages: str | None = Field(None, description="field with [{role, content}, …], by the tokenizer's chat template")
    max_new_tokens: int = Field(32, gt=0, description="longest answer in an evaluation")
    metric: Literal["rouge_l", "token_f1", "exact_match"] = "rouge_l"

    @field_validator("prompt", "completion")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        return check_template(value)

    @model_validator(mode="after")
    def _one_form(self):
        if (self.messages is None) == (self.prompt is None and self.completion is None):
            raise ValueError("give either prompt and completion, or messages (the name of a field with a chat)")
        if self.messages is None and not (self.prompt and self.completion):
            raise ValueError(
                'prompt and completion belong together, e.g. prompt: "Q: {question}\\nA:", completion: "{answer}"'
            )
        return self


class MultipleChoiceTask(TaskSource):
    """The likeliest of several continuations of a prompt."""

    kind: Literal["multiple-choice"]
    prompt: str = Field(description="template with {field} names; a choice follows")
    choices: str | list[str] = Field(
        description="field with a list of texts, or templates of the choices, e.g. ['{ending1}', '{ending2}']"
    )
    label: str = Field("label", description="field with the right choice: its index from 0, its letter, or its text")
    normalization: Literal["none", "tokens", "characters"] = Field(
        "none", description="what the log-likelihood of a choice is divided by before choices are compared"
    )
    metric: Literal["accuracy"] = "accuracy"

    @field_validator("prompt", "choices")
    @classmethod
    def _is_template(cls, value: str | list[str]) -> str | list[str]:
        for template in value if isinstance(value, list) else [value]:
            check_template(template)
        if isinstance(value, list) and len(value) < 2:
            raise ValueError("needs at least two choices")
        return value


TASKS: dict[str, type[TaskSource]] = {
    "classification": ClassificationTask,
    "language-modeling": LanguageModelingTask,
    "generation": GenerationTask,
    "multiple-choice": MultipleChoiceTask,
}
Task = Annotated[typing.Union[tuple(TASKS.values())], Field(discriminator="kind")]  # noqa: UP007


class RetentionCorpus(Source):
    """Text that no task trains on: its perplexity says what happened to the model's general language."""

    text: str = "text"
    split: str = "test"
    window: int | None = Field(None, ge=8, description="tokens of context; default: the model's own, at most 1024")
    stride: int | None = Field(None, ge=1, description="new tokens a window; default: half a window")

    @model_validator(mode="after")
    def _stride_fits(self):
        if self.stride and self.window and self.stride > self.window:
            raise ValueError(f"stride {self.stride} is larger than window {self.window}; tokens would be skipped")
        return self


class DurabilityConfig(Section):
    """What a run does against loss. Recorded, but no part of a step's identity: it changes no result."""

    checkpoint_seconds: float = Field(30.0, ge=0, description="between two checkpoints in the middle of a step")
    hang_timeout: float = Field(
        600.0, gt=0, description="seconds without a forward pass after which a worker ends itself and is restarted"
    )
    start_timeout: float = Field(
        600.0, gt=0, description="seconds without a sign of life from the workers after which the run fails"
    )
    max_failures: int = Field(3, ge=0, description="restarts without any progress between them")


class TrackingConfig(Section):
    uri: str = "sqlite:///mlflow.db"
    experiment: str | None = Field(None, description="default: the run's name")
    register_as: str | None = Field(None, description="model of the registry that finished chains become versions of")

    @field_validator("register_as")
    @classmethod
    def _safe(cls, value: str | None) -> str | None:
        return None if value is None else check_name(value)


class GateConfig(Section):
    """Limits that a finished chain is held against; the verdict stands in results.json.

    Against a champion (tracking.register_as) they are what each task and each corpus may lose; see pipelines/gate.py.
    """

    max_forgetting: float | None = Field(0.02, ge=0)
    max_nll_increase: float | None = Field(0.05, ge=0)
    max_perplexity_ratio: float | None = Field(1.05, gt=0)
    min_learning_accuracy: float | None = Field(None, ge=0, le=1)
    promote: bool = Field(True, description="a candidate that passes becomes the champion; false: by curlora promote")
    on_promotion: list[str] | None = Field(
        None, min_length=1, description="command and arguments run after a promotion, without a shell"
    )
    hook_timeout: float = Field(600.0, gt=0, description="seconds that the command may take")


def _seconds(value: Any) -> Any:
    """`90`, `"30s"`, `"10m"`, `"2h"`, `"1d"` as seconds."""
    found = DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else value


Duration = Annotated[float, Field(ge=0), BeforeValidator(_seconds)]


class DomainsConfig(Section):
    """New domains that train by themselves: what `curlora tick` and `curlora schedule` go by."""

    inbox: str = Field(description="folder or URI with a folder for every domain, of {train,test}.<format>")
    template: dict[str, Any] = Field(description="the task that a domain becomes, without name and data")
    marker: str = Field("_SUCCESS", description="file whose presence says that a domain is complete")
    quiet_period: Duration = Field(600.0, description="a domain without the marker is complete after so long a rest")
    address: str | None = Field(None, description="dashboard of the cluster that trains; null: RAY_API_SERVER_ADDRESS")
    shared_paths: bool = Field(False, description="every node mounts the paths here as this machine does")
    cron: str = Field("0 3 * * *", description="when curlora schedule looks: minute hour day month weekday")
    timezone: str = Field("UTC", description="of cron, e.g. Europe/Berlin")
    catch_up: Literal["once", "skip"] = Field("once", description="what to do about times that were missed")
    follow_up: Duration = Field(60.0, gt=0, description="between two looks while a job is at work")
    max_attempts: int = Field(3, gt=0, description="jobs that may break off before a domain is given up")

    @field_validator("template")
    @classmethod
    def _is_a_task(cls, value: dict[str, Any]) -> dict[str, Any]:
        if own := sorted({"name", "data"} & set(value)):
            raise ValueError(f"{own[0]} comes from the domain's folder; remove it")
        kind = value.get("kind")
        if kind not in TASKS:
            raise ValueError(f"kind: unknown kind {kind!r}, {did_you_mean(str(kind), TASKS)}")
        try:
            TASKS[kind](name="domain", data="inbox", **value)
        except ValidationError as error:
            found = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, found['loc'])) or kind}: {found['msg']}") from error
        return value

    @field_validator("marker")
    @classmethod
    def _is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", value) or value in (".", ".."):
            raise ValueError(f"'{value}' is not a file name; use letters, digits, '.', _ and -")
        return value


class Range(Section):
    """Numbers between two ends, both included. Whole ends mean whole numbers; write 1.0 for fractions."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="equal chances for equal ratios: for learning rates")

    @model_validator(mode="after")
    def _is_a_range(self):
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs positive numbers, low is {self.low:g}")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Choices = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[Any], Tag("list[Any]")],
    Discriminator(lambda value: "list[Any]" if isinstance(value, list) else "range"),
]


class Objective(Section):
    """What a trial is judged by, on validation data alone: learning − retention_weight × retention loss.

    Learning is the new task's score (minus its NLL for text); retention loss is the mean, over earlier tasks and
    retained text, of what each has lost since before the trial (score, or nats a token).
    """

    retention_weight: float = Field(1.0, ge=0)
    max_examples: int | None = Field(None, gt=0, description="seeded subset of each validation part")
    max_retention_tokens: int | None = Field(20_000, gt=0, description="the beginning of each retained text")


SEARCHED = ("adapter", "strategy", "training")
CARRIED = ("adapter", "strategy.name")  # what an adapter that goes from task to task cannot change on its way


class SearchConfig(Section):
    """Settings found by trials on validation data: `run` searches before its first task or before every one."""

    when: Literal["first", "every"] | None = Field(
        "first", description="first: on the first task, kept for all; every: before each task; null: curlora tune only"
    )
    space: dict[str, Choices] = Field(
        min_length=1, description="field path → a list of values, or a range {low, high, log}"
    )
    start_with: list[dict[str, Any]] = Field(
        default_factory=list, description="settings tried first, of any fields: field path → value"
    )
    trials: int | None = Field(None, gt=0, description="with start_with; default: 16, or all of a grid")
    algorithm: Literal["random", "optuna", "grid"] = "random"
    scheduler: Literal["asha", "none"] = Field("asha", description="asha: trials that lag behind at a rung end there")
    reduction: int = Field(3, ge=2, description="asha: one in so many goes on from a rung")
    rungs: int = Field(2, ge=1, le=6, description="asha: rungs before the end, each at 1/reduction of the next")
    objective: Objective = Objective()
    trial_training: dict[str, Any] = Field(
        default_factory=dict,
        description="training fields of trials alone, e.g. {max_train_examples: 2000}; the winner then trains anew",
    )
    max_concurrent: int | None = Field(None, gt=0, description="default: as many trials as the cluster holds")
    time_budget: float | None = Field(None, gt=0, description="seconds for one search; trials end there")
    seed: int = Field(0, ge=0)

    @field_validator("space")
    @classmethod
    def _has_choices(cls, value: dict) -> dict:
        for path, choices in value.items():
            if isinstance(choices, list) and len({str(c) for c in choices}) < len(choices):
                raise ValueError(f"{path} names a value twice")
            if isinstance(choices, list) and len(choices) < 2:
                raise ValueError(f"{path} has no choice; give two values or more, or set the field itself")
        return value

    @model_validator(mode="after")
    def _algorithm_fits(self):
        ranges = [path for path, choices in self.space.items() if isinstance(choices, Range)]
        if self.algorithm == "grid" and ranges:
            raise ValueError(f"algorithm 'grid' needs a list of values for {', '.join(ranges)}; or use random")
        if self.trials is not None and self.trials < len(self.start_with):
            raise ValueError(f"trials {self.trials} is fewer than the {len(self.start_with)} settings of start_with")
        return self

    @property
    def paths(self) -> list[str]:
        return list(dict.fromkeys([*self.space, *(path for point in self.start_with for path in point)]))


class PipelineConfig(Section):
    name: str
    base_model: BaseModelConfig
    storage: str = "./runs"
    start_from: str | None = Field(
        None, description="what the chain grows from: <run URI or path>/<step> or models:/name@alias; null: the base"
    )
    adapter: AdapterConfig = AdapterConfig()
    strategy: StrategyConfig = StrategyConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    durability: DurabilityConfig = DurabilityConfig()
    deepspeed: str | dict[str, Any] = Field("zero2", description="zero1 | zero2 | zero3 | zero3-offload | path | map")
    tasks: list[Task] = Field(default_factory=list, description="may be empty where domains bring them")
    retention: list[RetentionCorpus] = Field(default_factory=list)
    search: SearchConfig | None = Field(None, description="null: every field as it stands")
    tracking: TrackingConfig | None = Field(TrackingConfig(), description="null: no MLflow")
    gate: GateConfig | None = None
    domains: DomainsConfig | None = None

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        return check_name(value)

    @model_validator(mode="after")
    def _has_tasks(self):
        if not self.tasks and self.domains is None:
            raise ValueError("tasks: is empty; name at least one")
        return self

    @model_validator(mode="after")
    def _names_are_unique(self):
        names = [source.name for source in [*self.tasks, *self.retention]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks and retention share the name(s) {', '.join(twice)}; give each its own name")
        if "base" in names:
            raise ValueError("the name 'base' is taken by row 0 of the score matrix; rename the task")
        return self

    @model_validator(mode="after")
    def _search_begins_at_the_base(self):
        if self.search and (self.start_from or self.domains):
            found = "start_from" if self.start_from else "domains"
            raise ValueError(
                f"search and {found} are both set, but a search begins at the base; set search: null and write the "
                "setting that a search (curlora tune) has found into adapter and training"
            )
        return self

    @model_validator(mode="after")
    def _batch_feeds_every_worker(self):
        micro = self.training.batch_size // self.training.gradient_accumulation
        if micro < self.resources.workers:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} / gradient_accumulation "
                f"{self.training.gradient_accumulation} = {micro} examples for resources.workers "
                f"{self.resources.workers}; raise batch_size or lower workers"
            )
        return self

    @model_validator(mode="after")
    def _search_finds_its_fields(self):
        if self.search:
            from pipelines.space import check_space  # builds configurations itself

            check_space(self)
        return self

    @property
    def run_uri(self) -> str:
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def is_joint(self) -> bool:
        return self.strategy.name == "joint"

    def task(self, name: str):
        return next(task for task in self.tasks if task.name == name)


def check_name(value: str) -> str:
    """Names become folder names and tags: a safe alphabet only."""
    if not SAFE_NAME.fullmatch(value):
        raise ValueError(f"'{value}' is not a safe name; use letters, digits, _ and - (at most 64)")
    return value


def check_template(template: str | None) -> str | None:
    """A template holds plain `{field}` names only: no attributes, no indices, no conversions.

    Raises:
        ValueError: unbalanced braces, or something else than a name between them.
    """
    for name in template_fields(template or ""):
        if not FIELD_NAME.fullmatch(name):
            raise ValueError(f"'{{{name}}}' is not a field name; write a literal brace twice: {{{{ or }}}}")
    return template


def template_fields(template: str) -> list[str]:
    """Field names of a `"… {field} …"` template, in order and once each.

    Raises:
        ValueError: unbalanced braces.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"unbalanced braces ({error}); write a literal brace twice: {{{{ or }}}}") from error
    names = [
        name + (f":{spec}" if spec else "") + (f"!{conversion}" if conversion else "")
        for _, name, spec, conversion in parts
        if name is not None
    ]
    return list(dict.fromkeys(names))


def is_uri(value: str) -> bool:
    return "://" in value


def looks_local(value: str) -> bool:
    """Whether `value` means a path on this machine rather than a hub id: it has a path's form, or exists."""
    return not is_uri(value) and (value.startswith((".", "/", "~", "$")) or Path(value).exists())


def _absolute(value: str) -> str:
    value = os.path.expandvars(value)
    return os.path.abspath(os.path.expanduser(value)) if looks_local(value) else value


def resolve(config: PipelineConfig) -> PipelineConfig:
    """Relative paths made absolute against the current directory, once, so that workers agree on them."""
    raw = config.model_dump()
    raw["base_model"]["path"] = _absolute(raw["base_model"]["path"])
    if not is_uri(raw["storage"]):
        raw["storage"] = os.path.abspath(os.path.expanduser(os.path.expandvars(raw["storage"])))
    if raw["start_from"] and not is_uri(raw["start_from"]) and not raw["start_from"].startswith("models:/"):
        raw["start_from"] = os.path.abspath(os.path.expanduser(os.path.expandvars(raw["start_from"])))
    for source in [*raw["tasks"], *raw["retention"]]:
        source["data"] = _absolute(source["data"])
    if raw["domains"] and not is_uri(raw["domains"]["inbox"]):
        raw["domains"]["inbox"] = os.path.abspath(os.path.expanduser(os.path.expandvars(raw["domains"]["inbox"])))
    if isinstance(raw["deepspeed"], str) and raw["deepspeed"].endswith(".json"):
        raw["deepspeed"] = os.path.abspath(os.path.expanduser(raw["deepspeed"]))
    if raw["tracking"]:
        raw["tracking"]["uri"] = _absolute_sqlite(raw["tracking"]["uri"])
        raw["tracking"]["experiment"] = raw["tracking"]["experiment"] or raw["name"]
    return PipelineConfig.model_validate(raw)


def _absolute_sqlite(uri: str) -> str:
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        return prefix + os.path.abspath(uri[len(prefix) :])
    return uri


def load_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> PipelineConfig:
    """Read, override, validate and resolve a configuration file.

    Args:
        path: YAML file.
        overrides: `section.field=value` strings, values in YAML syntax; `tasks.0.data=…` reaches into lists.

    Raises:
        ConfigError: with every problem found.
    """
    return parse_config(read_config(path, overrides))


def read_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> dict:
    """A configuration file with overrides as a plain mapping, not yet validated."""
    raw = read_yaml(path)
    problems = [problem for item in overrides if (problem := _override(raw, item))]
    if problems:
        raise ConfigError(problems)
    return raw


def parse_config(raw: dict) -> PipelineConfig:
    """Validate a plain mapping; raise `ConfigError` with every problem."""
    unset = {name for text in _strings(raw) for name in VARIABLE.findall(text) if name not in os.environ}
    if unset:
        raise ConfigError(Problem(f"${{{name}}}", "this environment variable is not set") for name in sorted(unset))
    try:
        return resolve(PipelineConfig.model_validate(raw))
    except ValidationError as error:
        raise ConfigError([_explain(item) for item in error.errors()]) from error


def _strings(value: Any) -> Iterable[str]:
    """The paths of a configuration, where environment variables may stand."""
    if isinstance(value, dict):
        for key, nested in value.items():
            if key in ("path", "data", "storage", "inbox") and isinstance(nested, str):
                yield nested
            yield from _strings(nested)
    elif isinstance(value, list):
        for nested in value:
            yield from _strings(nested)


def _read_text(path: str) -> str:
    if not is_uri(path):
        return Path(path).read_text(encoding="utf-8")
    import fsspec  # for jobs, whose configuration lies in the run's storage

    return fsspec.open(path, "rb").open().read().decode("utf-8")


def read_yaml(path: str | os.PathLike) -> dict:
    try:
        text = _read_text(str(path))
    except (OSError, ValueError) as error:
        remedy = "check the path; shipped configurations lie in pipelines/configs"
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([Problem(str(path), f"cannot be read ({reason}); {remedy}")]) from error
    try:
        raw = yaml.load(text, _YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError([Problem(str(path), f"not valid YAML: {' '.join(str(error).split())}")]) from error
    if not isinstance(raw, dict):
        raise ConfigError([Problem(str(path), f"expected a mapping at the top level, found {type(raw).__name__}")])
    return raw


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-3 as a string; everybody who writes it means a number."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _override(raw: dict, item: str) -> Problem | None:
    key, separator, text = item.partition("=")
    if not separator or not key:
        return Problem("--set", f"'{item}' is not of the form field=value, e.g. training.learning_rate=5e-3")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = _descend(node, part)
        if node is None:
            return Problem("--set", f"'{key}': '{part}' is not a section")
    value = yaml.load(text, _YamlLoader)
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return Problem("--set", f"'{key}': the list has {len(node)} entries, counted from 0")
        node[int(last)] = value
    else:
        node[last] = value
    return None


def _descend(node: Any, part: str) -> Any:
    if isinstance(node, list):
        return node[int(part)] if part.isdigit() and int(part) < len(node) else None
    if not isinstance(node, dict):
        return None
    if not isinstance(node.get(part), dict | list):
        node[part] = {}
    return node[part]


def _explain(error: dict) -> Problem:
    """A pydantic error as one line: field, value found, remedy."""
    loc = [part for part in error["loc"] if not _is_union_tag(part)]
    field = ".".join(map(str, loc))
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        section = _section_at(error["loc"][:-1])
        parent = ".".join(map(str, loc[:-1]))
        return Problem(parent, f"unknown key '{loc[-1]}', {did_you_mean(str(loc[-1]), section.model_fields)}")
    if kind == "missing":
        return Problem(field, "is missing; it has no default")
    if kind == "value_error":
        return Problem(field, str(error["ctx"]["error"]))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        found = value.get("kind") if isinstance(value, dict) else value
        return Problem(f"{field}.kind", f"unknown kind {found!r}, {did_you_mean(str(found), TASKS)}")
    if kind == "none_required":
        reason = _section_at(error["loc"][:-1]).model_fields[error["loc"][-1]].description
        return Problem(field, f"found {_short(value)}, but only null is possible ({reason})")
    if kind == "literal_error":
        valid = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        return Problem(field, f"found {_short(value)}, {did_you_mean(str(value), valid)}")
    return Problem(field, f"found {_short(value)}: {error['msg'][0].lower() + error['msg'][1:]}")


def describe_error(error: dict) -> str:
    """A pydantic error in a few words, for those who validate parts themselves."""
    return str(_explain(error))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (
        part in (*TASKS, "list[str]", "str", "float", "TrackingConfig", "GateConfig", "DomainsConfig", "range")
        or part.startswith(("dict[", "literal[", "list["))
    )


def _section_at(loc: tuple) -> type[Section]:
    """The model class that a pydantic error location points into."""
    section: type[Section] = PipelineConfig
    for part in loc:
        if isinstance(part, str) and part in section.model_fields:
            nested = list(_sections(section.model_fields[part].annotation))
            section = nested[0] if nested else section
        elif part in TASKS:
            section = TASKS[part]
    return section


def _sections(annotation: Any) -> Iterable[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections(argument)
