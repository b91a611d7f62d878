"""Reads the docstrings of installed packages, without importing them."""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.demo.cleaning import clean, is_repetition
from pipelines.demo.presets import Library, Preset, Progress
from pipelines.errors import DemoError

NOT_TEXT = {"tests", "test", "testing", "conftest", "vendor", "thirdparty_files", "third_party"}
"""Folders and modules with tests or copies of other packages."""


@dataclass(frozen=True)
class Passage:
    """The cleaned text of one docstring and where it comes from; `part` is the top-level subpackage or module."""

    library: str
    module: str
    part: str
    text: str


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_corpus(preset: Preset, progress: Progress) -> dict[str, list[Passage]]:
    """The passages of every library of `preset` that is installed, without repetitions, by package name."""
    libraries = [*preset.classification, preset.language_modeling, *preset.pretraining]
    seen: set[int] = set()
    corpus = {}
    for done, library in enumerate(libraries):
        progress(done, len(libraries), f"reading the documentation of {library.package}")
        folder = locate(library)
        if folder is None:
            continue
        passages = extract(folder, library)
        corpus[library.package] = [p for p in passages if not is_repetition(p.text, seen)]
    progress(len(libraries), len(libraries), "documentation read")
    for library in (*preset.classification, preset.language_modeling):
        if library.package not in corpus:
            raise DemoError(
                f"the demo makes a task of the documentation of {library.package!r}, which is not installed: "
                f"pip install {library.distribution}"
            )
    return corpus


def locate(library: Library) -> Path | None:
    """The folder of an installed package, found without importing it; None where it is missing."""
    if installed_version(library.distribution) is None:
        return None
    spec = importlib.util.find_spec(library.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def extract(folder: Path, library: Library) -> list[Passage]:
    """Cleaned docstrings of the package in `folder`, in the order of relative path and line."""
    passages = []
    files = sorted(path.relative_to(folder).parts for path in folder.rglob("*.py"))
    with quiet_parser():
        for parts in files:
            names = [*parts[:-1], parts[-1].removesuffix(".py")]
            if names[0] in library.skip or _is_private(names[0]) or NOT_TEXT.intersection(names):
                continue
            module = ".".join([library.package, *(n for n in names if n != "__init__")])
            for docstring in read_docstrings(folder.joinpath(*parts)):
                text = clean(docstring)
                if text:
                    passages.append(Passage(library.package, module, names[0], text))
    return passages


def _is_private(name: str) -> bool:
    return name.startswith("_") and name != "__init__"


@contextmanager
def quiet_parser() -> Iterator[None]:
    """Without garbage collection, parsing is a third faster; warnings about other people's escapes are not ours."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if enabled:
            gc.enable()


def read_docstrings(path: Path) -> list[str]:
    """Docstrings of the module, its classes, their methods and its functions, from top to bottom."""
    source = path.read_text(encoding="utf-8", errors="replace")
    if '"""' not in source and "'''" not in source:
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        # Templates and files for other Python versions live in packages too; they document nothing here.
        return []
    return list(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield docstring
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child)
