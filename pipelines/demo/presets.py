"""Sizes of the demo: libraries, tasks, the base model and its pretraining."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[int, int, str], None]
"""`progress(done, total, text)`: how far the current phase, named by `text`, has come."""


@dataclass(frozen=True)
class Library:
    """An installed package as a source of text. `skip` names parts whose reading costs more than it gives."""

    distribution: str
    package: str
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """The size of a demo. Libraries of tasks must be installed; missing ones of the pretraining are left out."""

    name: str
    pretraining: tuple[Library, ...]
    classification: tuple[Library, ...]
    language_modeling: Library
    classes: int
    train_per_class: int
    validation_per_class: int
    test_per_class: int
    language_modeling_characters: tuple[int, int, int]
    """How much text the train, validation and test parts of the language-modelling task get at most."""
    retention_characters: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    context: int
    batch: int
    steps: int
    learning_rate: float
    min_gain: float
    """How many nats per token the model must beat the unigram by, on held-out text."""
    threads: int | None = None
    """Threads to train with, by default as many as torch has; more than one only hinders a tiny model."""


PRETRAINING = (
    Library("numpy", "numpy", ("distutils", "f2py")),
    Library("pandas", "pandas"),
    Library("scikit-learn", "sklearn", ("externals",)),
    Library("matplotlib", "matplotlib"),
    Library("networkx", "networkx"),
    Library("huggingface_hub", "huggingface_hub"),
    Library("datasets", "datasets", ("packaged_modules",)),
    Library("peft", "peft"),
    Library("accelerate", "accelerate", ("test_utils",)),
    Library("deepspeed", "deepspeed", ("inference", "module_inject", "ops")),
    Library("pydantic", "pydantic", ("v1",)),
    Library("fsspec", "fsspec"),
    Library("click", "click"),
    Library("werkzeug", "werkzeug"),
    Library("flask", "flask"),
    Library("jinja2", "jinja2"),
)

RAY = Library("ray", "ray", ("rllib", "dashboard", "core", "autoscaler", "experimental", "util"))
SCIPY = Library("scipy", "scipy")
SYMPY = Library("sympy", "sympy", ("parsing", "integrals", "logic", "plotting"))
SQLALCHEMY = Library("SQLAlchemy", "sqlalchemy", ("testing",))

PRESETS = {
    "full": Preset(
        name="full",
        pretraining=PRETRAINING,
        classification=(RAY, SCIPY, SYMPY),
        language_modeling=SQLALCHEMY,
        classes=3,
        train_per_class=250,
        validation_per_class=40,
        test_per_class=100,
        language_modeling_characters=(300_000, 30_000, 60_000),
        retention_characters=60_000,
        vocabulary=2048,
        hidden=128,
        intermediate=240,
        layers=3,
        heads=4,
        key_value_heads=2,
        context=128,
        batch=8,
        steps=800,
        learning_rate=4e-3,
        min_gain=1.0,
    ),
    "test": Preset(
        name="test",
        pretraining=(Library("networkx", "networkx"),),
        classification=(Library("huggingface_hub", "huggingface_hub"),),
        language_modeling=Library("fsspec", "fsspec"),
        classes=2,
        train_per_class=64,
        validation_per_class=16,
        test_per_class=32,
        language_modeling_characters=(20_000, 4_000, 4_000),
        retention_characters=8_000,
        vocabulary=1024,
        hidden=32,
        intermediate=64,
        layers=2,
        heads=2,
        key_value_heads=1,
        context=128,
        batch=8,
        steps=150,
        learning_rate=1e-2,
        min_gain=0.1,
        threads=1,
    ),
}


def no_progress(done: int, total: int, text: str) -> None:
    """The progress of a caller who wants none."""
