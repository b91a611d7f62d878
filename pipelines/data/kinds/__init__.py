"""Kinds of task: which columns they read, what they train on, how they are scored. One file per kind.

A new kind is a section in config/tasks.py (its YAML fields), one file here and one line in `KINDS`. A kind turns rows
into `Encoded` sequences and the scores of sequences into outcomes. Its *scorer* (evaluation/scorers.py) runs the
model: `head` (class of a sequence), `likelihood` (NLL of the tokens from `start` on), `choices` (NLL per choice) or
`greedy` (generated tokens).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.data.kinds.base import Kind
from pipelines.data.kinds.classification import Classifier, Verbalizer
from pipelines.data.kinds.generation import Generation
from pipelines.data.kinds.language_modeling import LanguageModeling, Retention
from pipelines.data.kinds.multiple_choice import MultipleChoice

if TYPE_CHECKING:
    from pipelines.config.tasks import Source

KINDS: dict[str, Kind] = {
    "classifier": Classifier(),
    "verbalizer": Verbalizer(),
    "generation": Generation(),
    "language-modeling": LanguageModeling(),
    "multiple-choice": MultipleChoice(),
    "retention": Retention(),
}


def kind_of(source: Source) -> Kind:
    """The kind of a task or retention corpus."""
    return KINDS[getattr(source, "head", None) or getattr(source, "kind", "retention")]
