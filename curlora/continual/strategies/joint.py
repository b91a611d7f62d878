"""Joint (multi-task) training in one step on the union of all tasks: the upper bound. The chain merges the tasks."""

from typing import ClassVar

from curlora.continual.strategy import Requires, Strategy
from curlora.names import JOINT


class Joint(Strategy):
    """No hook overridden: to the trainer, the union is one task."""

    name = JOINT
    requirements: ClassVar = {
        "adapter.carry": Requires(("continue", "stack", "fresh"), "it trains one adapter for all tasks at once")
    }
