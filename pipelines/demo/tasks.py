"""Turns passages into the demo's tasks: topic classification and text of several libraries."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.demo.corpus import Passage
from pipelines.demo.presets import Preset
from pipelines.errors import DemoError

SNIPPET_CHARACTERS = 200  # length of a text to classify: some 60 tokens, well within the context
SNIPPET_MIN_WORDS = 10
SNIPPETS_PER_DOCSTRING = 3

ORIGIN = "\nModule:"
"""Text between a passage and the module that it comes from."""


def with_origin(passage: Passage) -> str:
    """A passage as it is pretrained on: followed by its library and part, which the model learns to tell."""
    return f"{passage.text}{ORIGIN} {passage.library}.{passage.part}"


def by_hash(passages: Iterable[Passage]) -> list[Passage]:
    """Passages in an order that looks random and depends on nothing but their texts."""
    return sorted(passages, key=lambda passage: hashlib.sha256(passage.text.encode()).digest())


def take_characters(passages: list[Passage], characters: int) -> tuple[list[Passage], list[Passage]]:
    """Split off the first passages, together at most about `characters` long."""
    total = count = 0
    for count, passage in enumerate(passages, 1):  # noqa: B007
        total += len(passage.text)
        if total >= characters:
            break
    return passages[:count], passages[count:]


def write_tasks(folder: Path, corpus: dict[str, list[Passage]], preset: Preset) -> dict[str, Any]:
    """Write a folder for every task, named after its library; return what the manifest says about each."""
    described = {}
    for library in preset.classification:
        name = library.package
        described[name] = write_classification(folder / name, corpus[name], preset)
    name = preset.language_modeling.package
    described[name] = write_language_modeling(folder / name, corpus[name], preset)
    return described


def write_classification(folder: Path, passages: list[Passage], preset: Preset) -> dict[str, Any]:
    """Write a task whose classes are the parts of a library with the most passages, in equal numbers.

    All snippets of one docstring go into one split. Raises `DemoError` where a part has hardly any text.
    """
    labels = largest_parts(passages, preset.classes)
    by_part = {part: by_hash(passage for passage in passages if passage.part == part) for part in labels}
    wanted = split_sizes(by_part, preset)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in wanted}
    for label, part in enumerate(labels):
        remaining = by_part[part]
        for split, count in wanted.items():
            texts, remaining = take_snippets(remaining, count)
            splits[split] += [{"text": text, "label": label} for text in texts]
    for split, examples in splits.items():
        write_jsonl(folder / f"{split}.jsonl", sorted(examples, key=_example_key))
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    return {"kind": "classification", "labels": labels, **{s: len(examples) for s, examples in splits.items()}}


def split_sizes(by_part: dict[str, list[Passage]], preset: Preset) -> dict[str, int]:
    """Snippets of each class in each split: the preset's, or fewer in the same proportions if a class has fewer."""
    wanted = {
        "test": preset.test_per_class,
        "validation": preset.validation_per_class,
        "train": preset.train_per_class,
    }
    sizes = {part: sum(len(snippets(p.text)) for p in passages) for part, passages in by_part.items()}
    # A docstring that straddles two splits loses snippets: at most its others at each of the two borders.
    available = min(sizes.values(), default=0) - 2 * (SNIPPETS_PER_DOCSTRING - 1)
    share = min(1.0, available / sum(wanted.values()))
    if share < 0.25 or len(sizes) < preset.classes:
        raise DemoError(
            f"the installed documentation is too small for {preset.classes} classes of a task (passages: {sizes}): "
            "install the versions named in requirements.lock"
        )
    return {split: int(share * count) for split, count in wanted.items()}


def largest_parts(passages: list[Passage], count: int) -> list[str]:
    """The `count` parts with the most passages, largest first, ties by name."""
    sizes = Counter(passage.part for passage in passages if passage.part != "__init__")
    return [part for part, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:count]]


def take_snippets(passages: list[Passage], count: int) -> tuple[list[str], list[Passage]]:
    """`count` snippets of the first passages, and the passages after those."""
    texts: list[str] = []
    for position, passage in enumerate(passages):
        if len(texts) >= count:
            return texts[:count], passages[position:]
        texts += snippets(passage.text)
    return texts[:count], []


def snippets(text: str) -> list[str]:
    """Up to three pieces of a passage, short enough for the context and long enough to be classified."""
    pieces = textwrap.wrap(text, SNIPPET_CHARACTERS, break_on_hyphens=False)[:SNIPPETS_PER_DOCSTRING]
    return [piece + ORIGIN for piece in pieces if len(piece.split()) >= SNIPPET_MIN_WORDS]


def _example_key(example: dict[str, Any]) -> bytes:
    return hashlib.sha256(example["text"].encode()).digest()


def write_language_modeling(folder: Path, passages: list[Passage], preset: Preset) -> dict[str, Any]:
    """Whole passages in three parts of at most the preset's numbers of characters."""
    return {"kind": "language-modeling", **write_passages(folder, passages, preset.language_modeling_characters)}


def write_passages(folder: Path, passages: list[Passage], characters: tuple[int, int, int]) -> dict[str, int]:
    """Three splits of whole passages, each of at most about so many characters (train, validation, test); their sizes.

    Raises:
        DemoError: there are too few passages.
    """
    train, validation, test = characters
    remaining = by_hash(passages)
    counts = {}
    for split, most in (("test", test), ("validation", validation), ("train", train)):
        chosen, remaining = take_characters(remaining, most)
        if not chosen:
            raise DemoError(f"the documentation that {folder.name} is made of has no text for {split}")
        write_jsonl(folder / f"{split}.jsonl", [{"text": passage.text} for passage in chosen])
        counts[split] = len(chosen)
    return counts


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, in UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
