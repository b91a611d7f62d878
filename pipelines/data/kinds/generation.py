"""Generation: an answer written after a prompt, compared with a reference. The loss is on the answer alone.

A row looks like `{"question": "…", "answer": "…"}` for the templates `prompt` and `completion`, or like
`{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`, rendered by the tokenizer's
chat template; the last message is the answer. `chat: true` renders prompt and completion by it as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.config.tasks import GenerationTask, template_fields
from pipelines.data.encoding import Encoded, Encoder, fill
from pipelines.data.kinds.base import (
    EvaluationSet,
    Kind,
    Row,
    Scored,
    Summary,
    rows_of,
    short,
    template_problems,
    text_problems,
)
from pipelines.data.sources import records
from pipelines.metrics import answers as metrics_answers
from pipelines.metrics import score_matrix

if TYPE_CHECKING:
    import datasets

ROLES = ("system", "user", "assistant", "tool")

PROBE_CHAT = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


class Generation(Kind):
    name = "generation"
    scorer = "greedy"

    def inputs(self, task: GenerationTask) -> list[str]:
        return [task.messages] if task.messages else template_fields(task.prompt)

    def answers(self, task: GenerationTask) -> list[str]:
        return [] if task.messages else template_fields(task.completion)

    def input_problems(self, task: GenerationTask, row: Row) -> Iterator[str]:
        if task.messages:
            return message_problems(task.messages, row[task.messages])
        return template_problems(task.prompt, row)

    def row_problems(self, task: GenerationTask, row: Row) -> Iterator[str]:
        problems = list(self.input_problems(task, row))
        yield from problems
        if not task.messages:
            yield from template_problems(task.completion, row)
        elif not problems:
            yield from answer_problems(task.messages, row[task.messages])

    def task_problems(self, task: GenerationTask, encoder: Encoder | None) -> Iterator[str]:
        if encoder is None or not _is_chat(task):
            return
        if not encoder.tokenizer.chat_template:
            field = "messages" if task.messages else "chat: true"
            yield f"{field} needs a chat template, the tokenizer has none; use prompt and completion or another base"

    def text(self, task: GenerationTask, row: Row) -> str:
        if task.messages:
            return "\n".join(message["content"] for message in _asked(row[task.messages]))
        return super().text(task, row)

    def question(self, task: GenerationTask, row: Row) -> str:
        if not task.messages:
            return fill(task.prompt, row)
        asked = _asked(row[task.messages])
        if len(asked) == 1:
            return asked[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in asked)

    def reference(self, task: GenerationTask, row: Row) -> str | None:
        return row[task.messages][-1]["content"] if task.messages else fill(task.completion, row)

    # -- sequences

    def train(self, task: GenerationTask, rows: Iterable[Mapping[str, list]], encoder: Encoder) -> Iterator[Encoded]:
        number = 0
        for batch in rows:
            unpacked = list(rows_of(batch))
            prompts, answers = self._prompts(task, unpacked, encoder), self._completions(task, unpacked, encoder)
            for prompt, answer in zip(prompts, answers, strict=True):
                yield _example(number, prompt, answer, encoder)
                number += 1

    def items(self, task: GenerationTask, rows: Iterable[Mapping[str, list]], encoder: Encoder) -> Iterator[Encoded]:
        number = 0
        for batch in rows:
            for prompt in self._prompts(task, list(rows_of(batch)), encoder):
                kept = encoder.cut(prompt, encoder.max_length)
                yield Encoded(number, kept, start=len(kept))
                number += 1

    def _prompts(self, task: GenerationTask, rows: list[dict], encoder: Encoder) -> list[list[int]]:
        if _is_chat(task):  # the template writes the special tokens itself
            return encoder.bare([_chat(encoder, _asked(_messages(task, row)), True) for row in rows])
        return encoder.prompts([fill(task.prompt, row) for row in rows])

    def _completions(self, task: GenerationTask, rows: list[dict], encoder: Encoder) -> list[list[int]]:
        if _is_chat(task):
            return encoder.bare([_chat_answer(encoder, _messages(task, row, answered=True)) for row in rows])
        answers = encoder.answers(task.prompt, [fill(task.completion, row) for row in rows])
        return [[*answer, encoder.end] for answer in answers]

    def targets(self, task: GenerationTask, rows: datasets.Dataset, encoder: Encoder) -> dict[str, Any]:
        return {"references": tuple(self.reference(task, row) for row in records(rows))}

    def settings(self, task: GenerationTask, encoder: Encoder) -> dict[str, Any]:
        stops = {encoder.end}
        if _is_chat(task):
            special = set(encoder.tokenizer.all_special_ids)
            stops |= special.intersection(encoder.bare([_chat_answer(encoder, list(PROBE_CHAT))])[0])
        return {"max_new_tokens": task.max_new_tokens, "stops": tuple(sorted(stops))}

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


def _is_chat(task: GenerationTask) -> bool:
    """Whether rows are rendered by the chat template."""
    return bool(task.messages or task.chat)


def _messages(task: GenerationTask, row: Mapping[str, Any], answered: bool = False) -> list[dict]:
    """A row's chat; `answered`: with the assistant's answer, where prompt and completion make it."""
    if task.messages:
        return row[task.messages]
    asked = [{"role": "user", "content": fill(task.prompt, row)}]
    return [*asked, {"role": "assistant", "content": fill(task.completion, row)}] if answered else asked


def _example(number: int, prompt: list[int], answer: list[int], encoder: Encoder) -> Encoded:
    """Prompt and answer in `max_length` tokens; if both are long, each keeps about half."""
    half = encoder.max_length // 2
    answer = answer[: max(half, encoder.max_length - len(prompt))]
    kept = encoder.cut(prompt, encoder.max_length - len(answer))
    return Encoded(number, [*kept, *answer], start=len(kept))


def _written(evaluation: EvaluationSet, entry: Scored) -> str:
    return evaluation.tokenizer.decode(list(entry.output), skip_special_tokens=True).strip()


def _asked(messages: Sequence[Mapping]) -> list[dict]:
    """The messages before the answer; all of them if the last one is not by the assistant."""
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return [dict(message) for message in asked]


def _chat(encoder: Encoder, messages: list[dict], ask: bool) -> str:
    return encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)


def _chat_answer(encoder: Encoder, messages: Sequence[Mapping]) -> str:
    """The last message as rendered by the template, including the end of the turn."""
    prompt = _chat(encoder, _asked(messages), True)
    whole = _chat(encoder, [dict(message) for message in messages], False)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    # the template rewrites earlier turns: use the text itself and the tokenizer's eos
    return messages[-1]["content"] + (encoder.tokenizer.eos_token or "")


def message_problems(column: str, value: Any) -> Iterator[str]:
    """Why a value is not a chat."""
    if not isinstance(value, list) or not value:
        yield f"'{column}' is {short(value)}, expected a list of {{role, content}}; write it as a list"
        return
    for position, message in enumerate(value, 1):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str):
            yield f"'{column}', message {position} is {short(message)}, expected {{role, content}} with text"
        elif message.get("role") not in ROLES:
            found = short(message.get("role"))
            yield f"'{column}', message {position} has the role {found}, use one of: {', '.join(ROLES)}"
        else:
            yield from text_problems(f"{column}, message {position}", content)


def answer_problems(column: str, value: Sequence[Mapping]) -> Iterator[str]:
    """Why a chat has no answer to train on."""
    if len(value) < 2 or value[-1]["role"] != "assistant":
        yield (
            f"'{column}' ends with message {len(value)} of the role '{value[-1]['role']}', expected at least two that "
            "end with the assistant's answer; add it or drop the row"
        )
