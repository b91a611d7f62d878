"""Continual-learning strategies over any PEFT adapter: the interface, the registry, and helpers for strategies.

Each file in `strategies/` is one strategy. A new one is a new file there and nothing else.
"""

from curlora.continual.options import Option, option
from curlora.continual.registry import (
    STRATEGIES,
    describe_options,
    make_strategy,
    option_defaults,
    options_table,
)
from curlora.continual.strategies.sequential import Sequential
from curlora.continual.strategy import Example, Requires, StepOutput, Strategy, TaskContext

__all__ = [
    "STRATEGIES",
    "Example",
    "Option",
    "Requires",
    "Sequential",
    "StepOutput",
    "Strategy",
    "TaskContext",
    "describe_options",
    "make_strategy",
    "option",
    "option_defaults",
    "options_table",
]
