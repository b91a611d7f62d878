"""Joint (multi-task) training: one step on the union of all tasks. The upper bound; the chain makes it one step."""

from curlora.continual.strategy import Strategy


class Joint(Strategy):
    name = "joint"
