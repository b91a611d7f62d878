"""Continual-learning strategies over any adapter, by name."""

import difflib
import inspect

from curlora.continual.clora import CLora
from curlora.continual.coma import CoMA
from curlora.continual.ewc import EWC
from curlora.continual.ilora import ILora
from curlora.continual.joint import Joint
from curlora.continual.lwf import LwF
from curlora.continual.olora import OLora
from curlora.continual.rehearsal import Rehearsal
from curlora.continual.replay import Replay
from curlora.continual.sequential import Sequential
from curlora.continual.strategy import Example, Requires, StepOutput, Strategy, TaskContext

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Sequential, Replay, Rehearsal, ILora, CoMA, LwF, CLora, EWC, OLora, Joint)
}


def make_strategy(name: str, **options) -> Strategy:
    """The strategy called `name`; raises ValueError for an unknown name, an unknown option or an impossible value."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy '{name}', expected one of: {', '.join(sorted(STRATEGIES))}")
    known = option_defaults(name)
    unknown = [option for option in options if option not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"its options: {', '.join(known) or 'none'}"
        raise ValueError(f"strategy '{name}' does not take {', '.join(unknown)}; {hint}")
    try:
        return STRATEGIES[name](**options)
    except TypeError as error:  # a value of another type fails in a comparison
        raise ValueError(f"strategy '{name}': an option has a value of the wrong type ({error})") from error


def option_defaults(name: str) -> dict:
    """Option → default of a strategy."""
    if STRATEGIES[name].__init__ is object.__init__:
        return {}
    return {p.name: p.default for p in inspect.signature(STRATEGIES[name]).parameters.values()}


__all__ = [
    "STRATEGIES",
    "Example",
    "Requires",
    "StepOutput",
    "Strategy",
    "TaskContext",
    "make_strategy",
    "option_defaults",
]
