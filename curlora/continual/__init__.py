"""Continual-learning strategies over any adapter, by name."""

from curlora.continual.joint import Joint
from curlora.continual.sequential import Sequential
from curlora.continual.strategy import Example, StepOutput, Strategy, TaskContext

STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in (Sequential, Joint)}


def make_strategy(name: str, **options) -> Strategy:
    """The strategy called `name`; raises ValueError for an unknown name or option."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy '{name}', expected one of: {', '.join(sorted(STRATEGIES))}")
    try:
        return STRATEGIES[name](**options)
    except TypeError as error:
        raise ValueError(f"strategy '{name}' does not take {', '.join(sorted(options))} ({error})") from error


__all__ = ["STRATEGIES", "Example", "StepOutput", "Strategy", "TaskContext", "make_strategy"]
