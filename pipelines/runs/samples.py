"""Sample answers: prompts that the base and every step answer, so that one can read what was learned and forgotten.

{"key": "9c…", "task": "sst2", "row": 17, "prompt": "Review: …\\nSentiment:", "reference": "positive",
 "answer": "negative", "generated": "a film that …"}
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.runs.record import OPTIONAL, Record


@dataclass(frozen=True)
class Question(Record):
    """A prompt to be answered.

    Attributes:
        key: identity of the prompt and of how it is answered; an equal key needs no new answer.
        task, row: the task, and the row of its test split; None for a general prompt.
        prompt: what is asked, as one reads it. The model sees it as its task encodes it, cut to the same length.
        reference: the expected answer; None if there is none.
    """

    key: str
    task: str | None
    row: int | None
    prompt: str
    reference: str | None


@dataclass(frozen=True)
class Sample(Question):
    """A question with the answer of one step.

    Attributes:
        answer: the generated text; of tasks with classes or choices, the one that the model prefers.
        generated: what the model would write itself after the prompt of such a task; None for a classifier head.
    """

    answer: str = ""
    generated: str | None = field(default=None, metadata=OPTIONAL)

    @classmethod
    def of(cls, question: Question, answer: str, generated: str | None = None) -> Sample:
        """A question answered."""
        asked = {name: getattr(question, name) for name in ("key", "task", "row", "prompt", "reference")}
        return cls(**asked, answer=answer, generated=generated)
