"""Groups sequences into batches of roughly equal cost."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.data.encoding import Encoded


def make_batches(items: Sequence[Encoded], batch_tokens: int, new_tokens: int = 0) -> list[list[Encoded]]:
    """Batches of at most `batch_tokens` padded tokens (but at least one sequence), longest sequences first.

    Args:
        new_tokens: tokens that will be generated after each sequence.
    """
    ordered = sorted(items, key=lambda item: (-len(item.input_ids), item.example, item.choice))
    batches: list[list[Encoded]] = []
    for item in ordered:
        if batches and (len(batches[-1][0].input_ids) + new_tokens) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def make_question_batches(items: Sequence[Encoded], batch_tokens: int) -> list[list[Encoded]]:
    """Like `make_batches`, but keeps all alternatives of an example together, in order."""
    questions: dict[int, list[Encoded]] = {}
    for item in sorted(items, key=lambda item: (item.example, item.choice)):
        questions.setdefault(item.example, []).append(item)
    length = {example: max(len(item.input_ids) for item in group) for example, group in questions.items()}
    batches: list[list[Encoded]] = []
    longest = 0  # of the last batch
    for example in sorted(questions, key=lambda example: (-length[example], example)):
        group = questions[example]
        if batches and longest * (len(batches[-1]) + len(group)) <= batch_tokens:
            batches[-1].extend(group)
        else:
            batches.append(list(group))
            longest = length[example]
    return batches
