"""Tasks and retention corpora of a configuration, and the rules of prompt templates."""

from __future__ import annotations

import re
import string
import typing
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.sections import Section, check_name
from pipelines.metrics.answers import GENERATION_METRICS

FIELD_NAME = re.compile(r"[^\W\d][\w\- ]*")


class Source(Section):
    """Where rows come from. Formats: jsonl, json, csv, tsv, parquet, txt (pipelines/data/sources.py)."""

    name: str = Field(description="Name in results, folders and MLflow: letters, digits, _ and -.")
    data: str = Field(description="Folder with {train,validation,test}.<format>, file, hub id or fsspec URI.")
    subset: str | None = Field(None, description="Configuration of a hub dataset; null: its default.")
    revision: str | None = Field(None, description="Revision of a hub dataset; null: its default branch.")

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        return check_name(value)


class TaskSource(Source):
    """A task of the sequence. What each kind of task does is defined in pipelines/data/kinds/, one file per kind."""

    SOURCE_FIELDS: ClassVar = frozenset({"data", "subset", "revision"})
    SCORING_FIELDS: ClassVar = frozenset({"metric", "max_new_tokens", "normalization"})

    splits: dict[Literal["train", "validation", "test"], str] = Field(
        default_factory=dict, description="Split expression per part, e.g. {test: 'validation[:500]'}."
    )

    def training_identity(self) -> dict:
        """The fields that affect training. The location of the data is left out: its digest counts."""
        return self.model_dump(exclude=set(self.SOURCE_FIELDS | self.SCORING_FIELDS))

    def scoring_identity(self) -> dict:
        """The fields that affect a score."""
        return self.model_dump(exclude=set(self.SOURCE_FIELDS))


class ClassificationTask(TaskSource):
    """One of several classes, by a linear head or by the text that names the class."""

    kind: Literal["classification"] = Field(description="Kind of the task.")
    head: Literal["classifier", "verbalizer"] = Field(
        "classifier", description="classifier: a linear layer on the last token; verbalizer: the likeliest label text."
    )
    text: str | list[str] = Field("text", description="Field(s) with the text; several are joined by newlines.")
    label: str = Field("label", description="Field with the class: its position, value or name.")
    labels: list[str] | dict[int, str] | None = Field(
        None, description="Class names by position or by label value; null: labels.json beside the data."
    )
    prompt: str | None = Field(
        None, description="Template with {field} names that the label text follows; null: none (head classifier)."
    )
    verbalizer: list[str] | None = Field(None, description="Text of each label, in order; null: the class names.")
    metric: Literal["accuracy", "macro_f1"] = Field("accuracy", description="Score of the task, from 0 to 1.")

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
    """Next-token prediction on text, scored by NLL in nats per token."""

    kind: Literal["language-modeling"] = Field(description="Kind of the task.")
    text: str = Field("text", description="Field with the text.")
    documents: Literal["separate", "joined"] = Field(
        "separate",
        description="separate: no token sees another document; joined: one stream, with an end-of-text token after "
        "each document.",
    )

    @property
    def metric(self) -> str:
        return "nll"


# fields of a chat and their defaults: a task that leaves them as they are has the identity of a time without them
CHAT_DEFAULTS = {"chat": False, "format": None, "tools": None, "fold_system": False}
ALPACA = ("instruction", "input", "output")  # columns; input may be empty


class GenerationTask(TaskSource):
    """An answer written after a prompt: two templates, or a chat, where the answers are the assistant's messages."""

    kind: Literal["generation"] = Field(description="Kind of the task.")
    prompt: str | None = Field(None, description="Template of the prompt with {field} names; null: messages is used.")
    completion: str | None = Field(
        None, description="Template of the answer, e.g. '{answer}'; null: messages is used."
    )
    messages: str | None = Field(
        None,
        description="Field with [{role, content}, …], rendered by the tokenizer's chat template; null: prompt and "
        "completion are used.",
    )
    chat: bool = Field(
        False,
        description="Make prompt the user's message and completion the assistant's answer, in the tokenizer's chat "
        "template.",
    )
    format: Literal["sharegpt", "alpaca"] | None = Field(
        None,
        description="sharegpt: the field messages (default: conversations) holds [{from, value}, …]; alpaca: a chat "
        "of the fields instruction, input and output; null: the OpenAI form [{role, content}, …].",
    )
    learn: Literal["all", "last"] = Field(
        "all", description="Which of the assistant's messages in a chat have a loss: all of them, or the last one."
    )
    tools: str | None = Field(
        None,
        description="Field with the tools that a chat may call, a list of JSON schemas or its JSON text; null: none.",
    )
    fold_system: bool = Field(
        False,
        description="Put the system message before the first user's, for chat templates that refuse system messages.",
    )
    max_new_tokens: int = Field(32, gt=0, le=2**21, description="Longest answer in an evaluation, in tokens.")
    metric: Literal[tuple(GENERATION_METRICS)] = Field(
        "rouge_l", description="Score of an answer against the reference, from 0 to 1."
    )

    @field_validator("prompt", "completion")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        return check_template(value)

    @model_validator(mode="before")
    @classmethod
    def _where_sharegpt_keeps_its_chats(cls, raw):
        if isinstance(raw, dict) and raw.get("format") == "sharegpt" and raw.get("messages") is None:
            return raw | {"messages": "conversations"}
        return raw

    @model_validator(mode="after")
    def _one_form(self):
        templates = self.prompt is not None or self.completion is not None
        if self.format == "alpaca":
            if templates or self.messages or self.chat:
                raise ValueError(f"format: alpaca is a chat of {', '.join(ALPACA)}; remove prompt, messages and chat")
        elif (self.messages is None) == (not templates):
            raise ValueError("give either prompt and completion, or messages (the name of a field with a chat)")
        elif self.messages is None and not (self.prompt and self.completion):
            raise ValueError(
                'prompt and completion belong together, e.g. prompt: "Q: {question}\\nA:", completion: "{answer}"'
            )
        if self.chat and self.messages:
            raise ValueError("chat belongs to prompt and completion, messages are a chat already; remove chat")
        return self

    @model_validator(mode="after")
    def _settings_of_chats(self):
        if self.messages is None:
            for name, value in (("learn", self.learn == "last"), ("fold_system", self.fold_system)):
                if value:
                    raise ValueError(f"{name} belongs to messages, which this task does not have; remove {name}")
        if self.tools and not self.is_chat:
            raise ValueError("tools are shown by the chat template; add chat: true, or put them into prompt")
        return self

    @property
    def is_chat(self) -> bool:
        """Whether rows are rendered by the chat template."""
        return bool(self.messages or self.chat or self.format)

    def training_identity(self) -> dict:
        """Without `learn`: data/identity.py adds it where it changes what is learned."""
        return _without_chat_defaults(super().training_identity())

    def scoring_identity(self) -> dict:
        return _without_chat_defaults(super().scoring_identity())


def _without_chat_defaults(identity: dict) -> dict:
    known = {name: value for name, value in identity.items() if name != "learn"}
    return {name: value for name, value in known.items() if name not in CHAT_DEFAULTS or value != CHAT_DEFAULTS[name]}


class MultipleChoiceTask(TaskSource):
    """The likeliest of several continuations of a prompt."""

    kind: Literal["multiple-choice"] = Field(description="Kind of the task.")
    prompt: str = Field(description="Template with {field} names that a choice follows.")
    choices: str | list[str] = Field(
        description="Field with a list of texts, or one template per choice, e.g. ['{ending1}', '{ending2}']."
    )
    label: str = Field("label", description="Field with the right choice: its index from 0, letter or text.")
    normalization: Literal["none", "tokens", "characters"] = Field(
        "none", description="Divide the log-likelihood of a choice by its length in tokens or characters."
    )
    metric: Literal["accuracy"] = Field("accuracy", description="Score of the task, from 0 to 1.")

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
    """Text that no task trains on; its perplexity shows what happened to general language modelling."""

    text: str = Field("text", description="Field with the text.")
    split: str = Field("test", description="Split of the data to score.")
    window: int | None = Field(
        None, ge=8, le=2**21, description="Tokens per window; null: the context of the model, at most 1024."
    )
    stride: int | None = Field(None, ge=1, le=2**21, description="Tokens scored per window; null: half a window.")

    @model_validator(mode="after")
    def _stride_fits(self):
        if self.stride and self.window and self.stride > self.window:
            raise ValueError(f"stride {self.stride} is larger than window {self.window}; tokens would be skipped")
        return self


def check_template(template: str | None) -> str | None:
    """Return a template that holds plain `{field}` names only: no attributes, indices or conversions.

    Raises:
        ValueError: unbalanced braces, or anything but a field name between them.
    """
    for name in template_fields(template or ""):
        if not FIELD_NAME.fullmatch(name):
            raise ValueError(f"'{{{name}}}' is not a field name; write a literal brace twice: {{{{ or }}}}")
    return template


def template_fields(template: str) -> list[str]:
    """Field names of a template such as `"Q: {question}"`, in order, each once.

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
