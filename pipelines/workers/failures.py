"""Classifies the errors of workers: which are worth another start, and what a user should do about them."""

from __future__ import annotations

import errno

from pipelines.errors import ConfigError, DivergedError


class GroupLost(RuntimeError):
    """The group's Ray Train job was lost; another start may succeed."""


class WorkersFailed(RuntimeError):
    """The workers met an error that another start would meet again, or were lost too often."""


class WorkersSilent(RuntimeError):
    """The workers have shown no sign of life for too long."""


def root_cause(error: BaseException) -> str:
    """The last line of the worker's own error, out of nested Ray errors."""
    causes = getattr(getattr(error, "cause", None), "worker_failures", None) or getattr(error, "worker_failures", None)
    text = str(next(iter(causes.values()))) if causes else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else repr(error))


class DamagedStepError(RuntimeError):
    """A finished step lacks a file, or a file differs from the published one."""


CONCERTED = (DivergedError, ConfigError)  # raised by all ranks alike, so that none is left waiting for the others

PERMANENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def is_permanent(error: Exception) -> bool:
    """Whether another start would fail, too. A RuntimeError may be a lost peer, seen from a collective operation."""
    if isinstance(error, DivergedError | DamagedStepError) or _is_out_of_memory(error):
        return True
    if isinstance(error, OSError) and error.errno in PERMANENT_ERRNOS:
        return True
    return not isinstance(error, RuntimeError | OSError)


def explain(error: Exception) -> str:
    """The error as a message for the user, with a remedy."""
    text = f"{type(error).__name__}: {error}"
    if _is_out_of_memory(error):
        first = str(error).splitlines()[0]
        return (
            f"out of GPU memory ({first}); raise training.gradient_accumulation (smaller passes, same batch), lower "
            "training.max_length or evaluation.batch_tokens, set training.gradient_checkpointing: true, or use "
            "deepspeed: zero3 with more workers"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}: the storage is full; free some space, then run the same command again"
    return text


def _is_out_of_memory(error: Exception) -> bool:
    import torch  # slow, and drivers import this module too

    return isinstance(error, torch.OutOfMemoryError)
