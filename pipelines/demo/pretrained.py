"""Tasks of the demo on a real pretrained model (`curlora demo --base`), from installed packages, as in `build.py`.

Three tasks in which a small model that has seen much code has something left to learn: which library a passage
documents (label texts, so that the base has a score of its own), a chat that sums up a function in one line, and the
documentation of one library as text. What is written is cached under a fingerprint; `demo.json` comes last.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.data.node_cache import node_lock, published
from pipelines.demo.build import MANIFEST, DemoAssets
from pipelines.demo.cleaning import is_repetition
from pipelines.demo.corpus import Passage, extract, installed_version, locate, quiet_parser
from pipelines.demo.presets import RAY, SCIPY, SQLALCHEMY, SYMPY, Library, Progress, no_progress
from pipelines.demo.tasks import by_hash, take_characters, write_jsonl, write_passages
from pipelines.errors import DemoError

SUMMARY_WORDS = range(4, 16)
CODE_CHARACTERS = 400  # of a function to sum up, some 120 tokens
PASSAGE_CHARACTERS = 200
MARKUP = re.compile(r"`+|:\w+:(?=`)")
SENTENCE = re.compile(r"[A-Z][^:>\\]*\.")
TEMPLATE = "Sum up this function in one line.\n\n{code}"


@dataclass(frozen=True)
class Sizes:
    """Rows per split (train, validation, test) of the first two tasks, characters of the texts."""

    libraries: tuple[Library, ...] = (RAY, SCIPY, SYMPY)
    functions: Library = SCIPY
    text: Library = SQLALCHEMY
    retention: tuple[Library, ...] = (
        Library("networkx", "networkx"),
        Library("click", "click"),
        Library("pydantic", "pydantic", ("v1",)),
    )
    passages: tuple[int, int, int] = (160, 40, 60)
    summaries: tuple[int, int, int] = (96, 20, 32)
    text_characters: tuple[int, int, int] = (48_000, 10_000, 12_000)
    retention_characters: int = 20_000


def prepare_tasks(base: Path, cache: Path, progress: Progress = no_progress, sizes: Sizes | None = None) -> DemoAssets:
    """The tasks and the retention text, written on first use.

    Args:
        base: folder of the pretrained model.
        cache: folder in which the tasks are kept.

    Raises:
        DemoError: a library is missing or has too little documentation.
    """
    sizes = sizes or Sizes()
    root = cache / f"pretrained-{_fingerprint(sizes)[:12]}"
    with node_lock(str(root)):
        if not root.exists():
            with published(root) as folder:
                _write(folder, sizes, progress)
    manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    tasks = {name: root / "tasks" / name for name in manifest["tasks"]}
    return DemoAssets(root, base, tasks, root / "retention", manifest)


def _fingerprint(sizes: Sizes) -> str:
    libraries = {*sizes.libraries, sizes.functions, sizes.text, *sizes.retention}
    parts = {
        "code": [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))],
        "sizes": asdict(sizes),
        "versions": {name: installed_version(name) for name in sorted(library.distribution for library in libraries)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write(folder: Path, sizes: Sizes, progress: Progress) -> None:
    """Write tasks, retention text and, last, the manifest."""
    sources = [*sizes.libraries, sizes.text, *sizes.retention]
    passages: dict[str, list[Passage]] = {}
    seen: set[int] = set()
    for done, library in enumerate(sources):
        progress(done, len(sources), f"reading the documentation of {library.package}")
        found = extract(_folder(library), library)
        passages[library.package] = by_hash(p for p in found if not is_repetition(p.text, seen))
    tasks, name = folder / "tasks", sizes.text.package
    retained = by_hash(p for library in sizes.retention for p in passages[library.package])
    held_out, _ = take_characters(retained, sizes.retention_characters)
    write_jsonl(folder / "retention" / "test.jsonl", [{"text": p.text} for p in held_out])
    written = {
        "library": _write_libraries(tasks / "library", passages, sizes),
        "summary": _write_summaries(tasks / "summary", sizes),
        name: write_passages(tasks / name, passages[name], sizes.text_characters),
    }
    manifest = {"tasks": written, "retention": len(held_out)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    progress(len(sources), len(sources), "tasks written")


def _folder(library: Library) -> Path:
    folder = locate(library)
    if folder is None:
        message = f"the demo reads the documentation of {library.package!r}, which is not installed"
        raise DemoError(f"{message}: pip install {library.distribution}")
    return folder


# -- which library a passage documents


def _write_libraries(folder: Path, passages: dict[str, list[Passage]], sizes: Sizes) -> dict[str, int]:
    """Passages of every library in equal numbers. The library's own name does not occur in its passages."""
    labels = [library.package for library in sizes.libraries]
    rows: list[list[dict]] = []
    for label, name in enumerate(labels):
        texts = (_beginning(p.text) for p in passages[name])
        rows.append([{"text": text, "label": label} for text in texts if name not in text.lower()])
    needed = -(-sum(sizes.passages) // len(labels))
    if short := [name for name, found in zip(labels, rows, strict=True) if len(found) < needed]:
        raise DemoError(f"the documentation of {', '.join(short)} has fewer than {needed} passages for the demo")
    mixed = [row for group in zip(*rows, strict=False) for row in group]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    return _write_splits(folder, mixed, sizes.passages)


def _beginning(text: str) -> str:
    """The first words of a passage."""
    line = text.replace("\n", " ")
    return line if len(line) <= PASSAGE_CHARACTERS else line[:PASSAGE_CHARACTERS].rpartition(" ")[0]


# -- a function in one line


def _write_summaries(folder: Path, sizes: Sizes) -> dict[str, int]:
    """Chats: the user shows a function without its docstring, the assistant answers with its first sentence."""
    found = dict(functions(_folder(sizes.functions)))
    if len(found) < sum(sizes.summaries):
        raise DemoError(f"{sizes.functions.package} has only {len(found)} functions that the demo can use")
    ordered = sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    rows = [
        {
            "messages": [
                {"role": "user", "content": TEMPLATE.format(code=code)},
                {"role": "assistant", "content": summary},
            ]
        }
        for code, summary in ordered
    ]
    return _write_splits(folder, rows, sizes.summaries)


def functions(folder: Path) -> Iterator[tuple[str, str]]:
    """(code without docstring, first sentence of the docstring) of the short public functions of a package."""
    with quiet_parser():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if any("test" in part for part in parts):
                continue
            try:
                tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    yield from _described(node)


def _described(node: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2:
        return
    summary = _summary(docstring)
    node.body, node.decorator_list = node.body[1:], []
    code = ast.unparse(node)
    if len(summary.split()) in SUMMARY_WORDS and len(code) <= CODE_CHARACTERS:
        yield code, summary


def _summary(docstring: str) -> str:
    """The first sentence of a docstring, without markup; empty where it is none."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", MARKUP.sub("", paragraph))[0]
    return sentence if SENTENCE.fullmatch(sentence) else ""


def _write_splits(folder: Path, rows: list[dict], sizes: tuple[int, int, int]) -> dict[str, int]:
    """The first rows become the test split, then the validation and the train split."""
    train, validation, test = sizes
    begin = 0
    for split, count in (("test", test), ("validation", validation), ("train", train)):
        write_jsonl(folder / f"{split}.jsonl", rows[begin : begin + count])
        begin += count
    return {"train": train, "validation": validation, "test": test}
