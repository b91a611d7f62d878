"""What a kind of task is: which columns it reads, what it trains on, how it is scored. One file a kind.

A new kind is a section in config.py (its YAML fields), one file here and one line in `KINDS`. Kinds turn rows into
`Encoded` sequences and sequences' scores into outcomes; how a model is run is the *scorer*'s business
(pipelines/evaluation.py): `head` (a class a sequence), `likelihood` (NLL of the tokens from `start` on) or `greedy`
(tokens that the model writes after a prompt).
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
    """The behaviour of a task or a retention corpus."""
    return KINDS[getattr(source, "head", None) or getattr(source, "kind", "retention")]
