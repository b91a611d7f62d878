"""What an MLflow server with limits accepts: a number of items per request, and of parameters per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

# error codes with which servers refuse what is beyond their limits
REFUSALS = (
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "QUOTA_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "RESOURCE_LIMIT_EXCEEDED",
)
IN_A_ROW = 2  # single items refused one after another: the run is full

Item = TypeVar("Item")


def as_many_as_fit(send: Callable[[Sequence[Item]], object], items: Sequence[Item], most: int) -> list[Item]:
    """Send items in order; returns those that the server refuses.

    A batch that is refused is halved, so that any limit per request is met. An item that is refused alone is passed
    over, and after `IN_A_ROW` of them nothing more is tried.

    Args:
        send: sends one batch.
        most: items per batch at first.

    Raises:
        MlflowException: an error that is no refusal.
    """
    from mlflow.exceptions import MlflowException  # slow

    left, size, refused, in_a_row = list(items), most, [], 0
    while left and in_a_row < IN_A_ROW:
        batch = left[:size]
        try:
            send(batch)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            if len(batch) > 1:
                size = len(batch) // 2
                continue
            refused.append(batch[0])
            in_a_row += 1
        else:
            size, in_a_row = min(most, 2 * size), 0
        left = left[len(batch) :]
    return refused + left
