"""The base model that stays in a worker's memory, with adapters and heads on and off."""

from __future__ import annotations

import contextlib
import sys


@contextlib.contextmanager
def stdout_to_stderr():
    """Some libraries print progress to stdout, which belongs to the user's own pipes."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
