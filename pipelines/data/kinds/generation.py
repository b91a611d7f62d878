"""Generation: an answer written after a prompt, compared with a reference. The loss is on answers alone.

A row looks like `{"question": "…", "answer": "…"}` for the templates `prompt` and `completion`, or holds a chat
(chats.py) that the tokenizer's chat template renders (chat_template.py). `chat: true` renders prompt and completion by
it as well. Of a chat, the last message is the answer that is scored; in training, earlier ones are learned as well
(`learn: all`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.config.tasks import ALPACA, GenerationTask, template_fields
from pipelines.data.encoding import Encoded, Encoder, fill
from pipelines.data.kinds.base import EvaluationSet, Kind, Row, Scored, Summary, rows_of
from pipelines.data.kinds.chat_template import Tokens, template_of
from pipelines.data.kinds.chats import answer_problems, asked_of, chat_of, chat_problems, shown, tools_of
from pipelines.data.sources import records
from pipelines.metrics import answers as metrics_answers
from pipelines.metrics import score_matrix

if TYPE_CHECKING:
    import datasets


class Generation(Kind):
    name = "generation"
    scorer = "greedy"

    def inputs(self, task: GenerationTask) -> list[str]:
        if task.messages:
            asked = [task.messages]
        else:
            asked = list(ALPACA[:2]) if task.format else template_fields(task.prompt)
        return list(dict.fromkeys([*asked, *([task.tools] if task.tools else [])]))

    def answers(self, task: GenerationTask) -> list[str]:
        if task.messages:
            return []
        return [ALPACA[-1]] if task.format else template_fields(task.completion)

    def input_problems(self, task: GenerationTask, row: Row) -> Iterator[str]:
        return chat_problems(task, row)

    def row_problems(self, task: GenerationTask, row: Row) -> Iterator[str]:
        problems = list(self.input_problems(task, row))
        yield from problems
        if not problems:
            yield from answer_problems(task, row)

    def rendering_problems(self, task: GenerationTask, row: Row, encoder: Encoder, training: bool) -> Iterator[str]:
        if not task.is_chat or not encoder.tokenizer.chat_template:
            return iter(())
        learn = task.learn if training else "last"
        return template_of(encoder).problems(chat_of(task, row), tools_of(task, row), learn)

    def task_problems(self, task: GenerationTask, encoder: Encoder | None) -> Iterator[str]:
        if encoder is None or not task.is_chat or encoder.tokenizer.chat_template:
            return
        field = "messages" if task.messages else f"format: {task.format}" if task.format else "chat: true"
        yield f"{field} needs a chat template, the tokenizer has none; use prompt and completion or another base"

    def unused_columns(self, task: GenerationTask, columns: Sequence[str]) -> Iterator[str]:
        if task.is_chat and not task.tools and "tools" in columns:
            yield "the column 'tools' is not used; set tools: tools to show the model what it may call"

    def text(self, task: GenerationTask, row: Row) -> str:
        if task.is_chat:
            return "\n".join(shown(message) for message in asked_of(chat_of(task, row, answered=False)))
        return super().text(task, row)

    def question(self, task: GenerationTask, row: Row) -> str:
        if not task.is_chat:
            return fill(task.prompt, row)
        asked = asked_of(chat_of(task, row, answered=False))
        if len(asked) == 1:
            return shown(asked[0])
        return "\n".join(f"{message['role']}: {shown(message)}" for message in asked)

    def reference(self, task: GenerationTask, row: Row) -> str | None:
        return shown(chat_of(task, row)[-1]) if task.is_chat else fill(task.completion, row)

    # -- sequences

    def train(self, task: GenerationTask, rows: Iterable[Mapping[str, list]], encoder: Encoder) -> Iterator[Encoded]:
        number = 0
        for batch in rows:
            for prompt, answer in self._parts(task, list(rows_of(batch)), encoder, task.learn):
                yield _example(number, prompt, answer, encoder)
                number += 1

    def items(self, task: GenerationTask, rows: Iterable[Mapping[str, list]], encoder: Encoder) -> Iterator[Encoded]:
        number = 0
        for batch in rows:
            for prompt in self._prompts(task, list(rows_of(batch)), encoder):
                kept = encoder.cut(prompt, encoder.max_length)
                yield Encoded(number, kept, start=len(kept), cut=max(0, len(prompt) - len(kept)))
                number += 1

    def _prompts(self, task: GenerationTask, rows: list[dict], encoder: Encoder) -> list[list[int]]:
        if task.is_chat:  # the template writes the special tokens itself
            template = template_of(encoder)
            chats = [(chat_of(task, row, answered=False), tools_of(task, row)) for row in rows]
            return encoder.bare([template.prompt(chat, tools) for chat, tools in chats])
        return encoder.prompts([fill(task.prompt, row) for row in rows])

    def _parts(
        self, task: GenerationTask, rows: list[dict], encoder: Encoder, learn: str
    ) -> Iterator[tuple[Tokens, Tokens]]:
        """(prompt, answer) of each row."""
        if task.is_chat:
            yield from template_of(encoder).encode([(chat_of(task, row), tools_of(task, row)) for row in rows], learn)
            return
        answers = encoder.answers(task.prompt, [fill(task.completion, row) for row in rows])
        for prompt, answer in zip(self._prompts(task, rows, encoder), answers, strict=True):
            yield Tokens(prompt, [False] * len(prompt)), Tokens([*answer, encoder.end], [True] * (len(answer) + 1))

    def targets(self, task: GenerationTask, rows: datasets.Dataset, encoder: Encoder) -> dict[str, Any]:
        return {"references": tuple(self._target(task, row, encoder) for row in records(rows))}

    def _target(self, task: GenerationTask, row: dict, encoder: Encoder) -> str:
        """What the model should write: the text of the answer, or its tool calls in the words of the template."""
        if not task.is_chat or not chat_of(task, row)[-1].get("tool_calls"):
            return self.reference(task, row)
        (_, answer), *_ = self._parts(task, [row], encoder, "last")
        return _decoded(encoder.tokenizer, itertools.compress(answer.ids, answer.learned))

    def settings(self, task: GenerationTask, encoder: Encoder) -> dict[str, Any]:
        ends = template_of(encoder).ends if task.is_chat else ()
        return {"max_new_tokens": task.max_new_tokens, "stops": tuple(sorted({encoder.end, *ends}))}

    # -- scores

    def predictions(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        return [{"prediction": _written(evaluation, entry)} for entry in sorted(scored)]

    def outcomes(self, evaluation: EvaluationSet, scored: Sequence[Scored]) -> list[dict]:
        outcomes = []
        for entry in sorted(scored):
            text, reference = _written(evaluation, entry), evaluation.references[entry.example]
            scores = {name: score(text, reference) for name, score in metrics_answers.GENERATION_METRICS.items()}
            outcomes.append(
                {
                    "id": evaluation.row_numbers[entry.example],
                    "reference": reference,
                    "prediction": text,
                    "correct": bool(scores["exact_match"]),
                    "score": scores[evaluation.metric],
                    **scores,
                }
            )
        return outcomes

    def summary(self, evaluation: EvaluationSet, outcomes: Sequence[dict]) -> Summary:
        means = {name: score_matrix.mean(o[name] for o in outcomes) for name in metrics_answers.GENERATION_METRICS}
        return Summary(means[evaluation.metric], extras=means)


def _example(number: int, prompt: Tokens, answer: Tokens, encoder: Encoder) -> Encoded:
    """Prompt and answer in `max_length` tokens; if both are long, each keeps about half.

    What is left of an earlier answer that lost its beginning is context.
    """
    half, whole = encoder.max_length // 2, len(prompt.ids) + len(answer.ids)
    end = max(half, encoder.max_length - len(prompt.ids))
    kept = encoder.cut(prompt.ids, encoder.max_length - len(answer.ids[:end]))
    ids, lost = [*kept, *answer.ids[:end]], len(prompt.ids) - len(kept)
    learned = _after_cut(prompt.learned, lost + len(encoder.prefix)) if lost > 0 else prompt.learned
    flags = [*[False] * (len(kept) - len(learned)), *learned, *answer.learned[:end]]
    start, gaps = flags.index(True), []
    at = 0
    for is_learned, run in itertools.groupby(flags):
        length = len(list(run))
        gaps += [at, at + length] if not is_learned and at > start else []
        at += length
    return Encoded(number, ids, start=start, gaps=tuple(gaps), cut=max(0, whole - len(ids)))


def _after_cut(learned: list[bool], at: int) -> list[bool]:
    """What is learned of the tokens from `at` on: not the rest of a run that began before."""
    kept = learned[at:]
    if kept and at and learned[at - 1]:
        rest = sum(1 for _ in itertools.takewhile(bool, kept))
        kept[:rest] = [False] * rest
    return kept


def _written(evaluation: EvaluationSet, entry: Scored) -> str:
    return _decoded(evaluation.tokenizer, entry.output)


def _decoded(tokenizer, ids: Iterable[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()
