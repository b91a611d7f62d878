"""Joint (multi-task) training in one step on the union of all tasks: the upper bound. The chain merges the tasks."""

from curlora.continual.strategy import Strategy
from curlora.names import JOINT


class Joint(Strategy):
    """No hook overridden: to the trainer, the union is one task."""

    name = JOINT
