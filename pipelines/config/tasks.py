"""Tasks and retention corpora as a configuration describes them, and prompt templates."""

from __future__ import annotations

import re
import string
import typing
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.sections import Section, check_name

FIELD_NAME = re.compile(r"[^\W\d][\w\- ]*")


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
