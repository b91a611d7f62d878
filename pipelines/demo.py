"""Everything `curlora demo` needs, made from the Python environment itself: no network, no data files.

The installed packages carry megabytes of English documentation in several domains. Their docstrings are read with
`ast` (no package is imported); one part pretrains a small Llama-shaped language model, four libraries that the model
never saw become tasks, and passages held out of the pretraining become the retention text. The result is cached under
a fingerprint, and `demo.json`, written last, marks a folder as complete. This module prepares; it runs no chain.

One record of a classification task (`<task>/train.jsonl`, the label is an index into `labels.json`):

    {"text": "Minimize a scalar function of one or more variables ...\nModule:", "label": 1}

The base model is pretrained on passages that end with the module they come from ("...\nModule: numpy.linalg"), so its
state at `Module:` sums a passage up, and a classifier that reads the last token of a task's text has a fair start.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import tempfile
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Progress = Callable[[int, int, str], None]
"""`progress(done, total, text)`: how far the current phase, named by `text`, has come."""

MANIFEST = "demo.json"


class DemoError(RuntimeError):
    """The demo cannot be prepared from this environment; the message says what to do."""


# ---------------------------------------------------------------------------------------------- what is made of what


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


@dataclass(frozen=True)
class DemoAssets:
    """What a prepared demo consists of; every path exists."""

    root: Path
    base_model: Path
    tasks: dict[str, Path]
    """Task name to its folder of `{train,validation,test}.jsonl`; classification has `labels.json` as well."""
    retention: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Passage:
    """The cleaned text of one docstring and where it comes from; `part` is the top-level subpackage or module."""

    library: str
    module: str
    part: str
    text: str


# ------------------------------------------------------------------------------------------------------ entry point


def prepare_demo(
    cache_dir: Path | None = None, *, preset: str = "full", progress: Progress | None = None
) -> DemoAssets:
    """Return the demo's model, tasks and retention text, building them on first use.

    `cache_dir` defaults to `$CURLORA_CACHE`, then `~/.cache/curlora/demo`. Raises `DemoError` when a task's library
    is missing, has too little text, or the pretrained model is not good enough.
    """
    settings = PRESETS[preset]
    cache = cache_dir or Path(os.environ.get("CURLORA_CACHE") or Path.home() / ".cache" / "curlora" / "demo")
    root = Path(cache).expanduser().resolve() / f"{preset}-{fingerprint(settings)[:12]}"
    if not (root / MANIFEST).is_file():
        _build_and_publish(root, settings, progress or _silent)
    return _assets(root)


def fingerprint(preset: Preset) -> str:
    """Identity of the demo: this code, the preset, and the versions of what is read or makes the model.

    Versions stand for the corpus, so that a warm start parses nothing.
    """
    libraries = [*preset.pretraining, *preset.classification, preset.language_modeling]
    names = sorted({library.distribution for library in libraries} | {"torch", "transformers", "tokenizers"})
    parts = {
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "preset": asdict(preset),
        "versions": {name: _version(name) for name in names},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _assets(root: Path) -> DemoAssets:
    manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    tasks = {name: root / "tasks" / name for name in manifest["tasks"]}
    return DemoAssets(root, root / "model", tasks, root / "retention", manifest)


def _build_and_publish(root: Path, preset: Preset, progress: Progress) -> None:
    """Build in a private folder and rename it into place, so that two processes at once cannot mix their files."""
    root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        build_demo(building, preset, progress)
        if root.exists() and not (root / MANIFEST).is_file():
            shutil.rmtree(root)
        try:
            building.rename(root)
        except OSError:
            # Another process was first: its folder has the same fingerprint, so either will do.
            if not (root / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _silent(done: int, total: int, text: str) -> None:
    """The progress of a caller who wants none."""


def build_demo(folder: Path, preset: Preset, progress: Progress) -> None:
    """Write model, tasks, retention text and, last, the manifest into the empty `folder`."""
    corpus = read_corpus(preset, progress)
    # Tasks first: where two libraries share a text, the task keeps it and the pretraining never sees it.
    tasks = write_tasks(folder / "tasks", corpus, preset)
    pretraining = [passage for library in preset.pretraining for passage in corpus.get(library.package, [])]
    held_out, train = take_characters(by_hash(pretraining), preset.retention_characters)
    write_jsonl(folder / "retention" / "test.jsonl", [{"text": with_origin(passage)} for passage in held_out])
    texts = [with_origin(passage) for passage in train], [with_origin(passage) for passage in held_out]
    model = pretrain(folder / "model", *texts, preset, progress)
    manifest = {
        "preset": preset.name,
        "fingerprint": fingerprint(preset),
        "corpus_digest": _digest(passage.text for passages in corpus.values() for passage in passages),
        "libraries": {name: len(passages) for name, passages in corpus.items()},
        "model": model,
        "tasks": tasks,
        "retention": {"examples": len(held_out), "characters": sum(len(text) for text in texts[1])},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------- reading docstrings

NOT_TEXT = {"tests", "test", "testing", "conftest", "vendor", "thirdparty_files", "third_party"}
"""Folders and modules that hold tests or copies of other people's packages."""


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
    if _version(library.distribution) is None:
        return None
    spec = importlib.util.find_spec(library.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def extract(folder: Path, library: Library) -> list[Passage]:
    """Cleaned docstrings of the package in `folder`, in the order of relative path and line."""
    passages = []
    files = sorted(path.relative_to(folder).parts for path in folder.rglob("*.py"))
    with _quiet_parser():
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
def _quiet_parser() -> Iterator[None]:
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


# ------------------------------------------------------------------------------------------------ cleaning the text

MIN_WORDS = 8
TABLES = (
    "parameters|other parameters|arguments|args|kwargs|keyword arguments|keyword args|returns?|yields?|raises|"
    "warns|receives|see also|references?|examples?|attributes|methods|usages?|example usage|usage example|shape|"
    "inputs?|outputs?|call arguments|todo|bibliography|copyright|license"
)
NUMPY_RULE = re.compile(r"\s*[-=~^\"*#+]{3,}\s*$")
NUMPY_TABLE = re.compile(rf"\s*({TABLES})\s*:?\s*$", re.I)
GOOGLE_TABLE = re.compile(rf"(\s*)({TABLES})\s*(\([^)]*\))?\s*::?\s*$", re.I)
DIRECTIVE = re.compile(r"(\s*)\.\. ")
ADMONITION = re.compile(r"\s*\.\. (note|warning|tip|important|caution|hint)::\s*", re.I)
FIELD = re.compile(r"(\s*)(:\w[^:`]*:(\s|$)|@\w+)")
DOCTEST = re.compile(r"\s*(>>>|In \[)")
FENCE = re.compile(r"\s*(```|~~~)")
MARKUP = [
    (re.compile(r":[\w:]+:`[~!]?([^`<]*?)\s*(<[^`>]*>)?`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\((https?:|#)[^)]*\)"), r"\1"),
    (re.compile(r"<?https?://\S+"), ""),
    (re.compile(r"\s*\[[\w#*]+\]_"), ""),
    (re.compile(r"`+_{0,2}"), ""),
    (re.compile(r"\*{1,2}(\w[^*]*?)\*{1,2}"), r"\1"),
    (re.compile(r"</?[a-zA-Z][^>]*>"), ""),
    # A dotted name would give away which part of the library a passage belongs to.
    (re.compile(r"\b(?:[A-Za-z_]\w+\.)+([A-Za-z_]\w*)"), r"\1"),
    (re.compile(r"^\s*([-*•+]|\d+[.)]|#+)\s+"), ""),
    (re.compile(r"\s+"), " "),
]
PUNCTUATION = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " "})
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the a an of to in is are be for and or that this with by on as if it not from which when at can will was "
        "has have used using each all any into its but should may must than then also only no one where",
    )
)


def clean(docstring: str) -> str:
    """The English prose of a docstring, one paragraph a line; empty where too little is left."""
    lines = inspect.cleandoc(docstring.translate(PUNCTUATION)).splitlines()
    paragraphs = (_plain(paragraph) for paragraph in _paragraphs(_prose_lines(lines)))
    text = "\n".join(paragraph for paragraph in paragraphs if is_english(paragraph))
    return text if len(text.split()) >= MIN_WORDS else ""


def _prose_lines(lines: list[str]) -> Iterator[str]:
    """Drop tables of parameters, code, doctests, directives and headings; what is dropped ends a paragraph."""
    position = 0
    while position < len(lines):
        line = lines[position]
        following = lines[position + 1] if position + 1 < len(lines) else ""
        if line.strip() and NUMPY_RULE.match(following):
            position += 2
            if NUMPY_TABLE.match(line):
                position = _next_heading(lines, position)
            yield ""
        elif ADMONITION.match(line):
            yield ""
            yield ADMONITION.sub("", line)
            position += 1
        elif FENCE.match(line):
            position = _after(lines, position + 1, FENCE)
            yield ""
        elif DOCTEST.match(line):
            position = _next_blank(lines, position)
            yield ""
        elif GOOGLE_TABLE.match(line) or DIRECTIVE.match(line) or FIELD.match(line):
            position = _after_block(lines, position)
            yield ""
        elif line.rstrip().endswith("::"):
            yield line.rstrip()[:-1]
            yield ""
            position = _after_block(lines, position)
        else:
            yield line
            position += 1


def _next_heading(lines: list[str], position: int) -> int:
    while position < len(lines):
        if position + 1 < len(lines) and lines[position].strip() and NUMPY_RULE.match(lines[position + 1]):
            return position
        position += 1
    return position


def _next_blank(lines: list[str], position: int) -> int:
    while position < len(lines) and lines[position].strip():
        position += 1
    return position


def _after(lines: list[str], position: int, end: re.Pattern[str]) -> int:
    while position < len(lines) and not end.match(lines[position]):
        position += 1
    return position + 1


def _after_block(lines: list[str], position: int) -> int:
    """The first line after `position` that is indented no deeper than it."""
    depth = _indent(lines[position])
    position += 1
    while position < len(lines) and (not lines[position].strip() or _indent(lines[position]) > depth):
        position += 1
    return position


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in (*lines, ""):
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []


def _plain(paragraph: str) -> str:
    """The paragraph without markup, on one line."""
    for pattern, replacement in MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    return paragraph.strip()


def is_english(paragraph: str) -> bool:
    """Whether a paragraph reads as English prose rather than as a formula, a table or another language."""
    words = paragraph.split()
    if len(words) < 4 or not paragraph.isascii() or "\\" in paragraph or "|" in paragraph:
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    functional = sum(word.lower().strip(".,:;()") in FUNCTION_WORDS for word in words)
    return letters >= 0.85 * len(paragraph) and functional >= 0.15 * len(words)


def is_repetition(text: str, seen: set[int]) -> bool:
    """Whether half of the five-word runs of `text` were `seen` before; if not, they are from now on."""
    words = re.findall(r"[a-z]+", text.lower())
    runs = {_run_key(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
    if 2 * len(runs & seen) >= len(runs):
        return True
    seen |= runs
    return False


def _run_key(words: list[str]) -> int:
    # Not hash(): that of strings differs from process to process, and a rare collision would too.
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "big")


# ----------------------------------------------------------------------------------------------------------- tasks

SNIPPET_CHARACTERS = 200
"""Length of a passage to classify: some 60 tokens, well within the context."""
SNIPPET_MIN_WORDS = 10
SNIPPETS_PER_DOCSTRING = 3


ORIGIN = "\nModule:"
"""What stands between a passage and the module that it comes from."""


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
    """Which part of a library is a passage about? The classes are the parts with the most passages, in equal numbers.

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
    train, validation, test = preset.language_modeling_characters
    remaining = by_hash(passages)
    counts = {}
    for split, characters in (("test", test), ("validation", validation), ("train", train)):
        chosen, remaining = take_characters(remaining, characters)
        if not chosen:
            raise DemoError(f"the documentation of {preset.language_modeling.package} has no text for {split}")
        write_jsonl(folder / f"{split}.jsonl", [{"text": passage.text} for passage in chosen])
        counts[split] = len(chosen)
    return {"kind": "language-modeling", **counts}


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- pretraining

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def pretrain(
    folder: Path, train: list[str], held_out: list[str], preset: Preset, progress: Progress
) -> dict[str, Any]:
    """Train tokenizer and model on `train`, save both in `folder`, return what was measured.

    Raises `DemoError` when the held-out NLL is not `preset.min_gain` nats per token below the unigram's.
    """
    progress(0, preset.steps, "training the tokenizer")
    tokenizer = train_tokenizer(train, preset)
    tokenizer.save_pretrained(folder)
    train_ids, held_out_ids = encode(tokenizer, train), encode(tokenizer, held_out)
    with torch_threads(preset.threads):
        model = train_model(train_ids, tokenizer, preset, progress)
        nll = model_nll(model, held_out_ids, preset.context)
    unigram = unigram_nll(train_ids, held_out_ids, len(tokenizer))
    if unigram - nll < preset.min_gain:
        raise DemoError(
            f"the pretrained model's held-out NLL is {nll:.3f} nats per token against the unigram's {unigram:.3f}: it "
            f"must be {preset.min_gain} lower. There is too little text ({len(train_ids)} tokens) or too little "
            f"training ({preset.steps} steps); install the versions named in requirements.lock"
        )
    save_quietly(model, folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "context": preset.context,
        "steps": preset.steps,
        "train_tokens": len(train_ids),
        "held_out_tokens": len(held_out_ids),
        "held_out_nll": nll,
        "unigram_nll": unigram,
    }


def train_tokenizer(texts: list[str], preset: Preset) -> Any:
    """A byte-level BPE tokenizer that puts `<s>` before a text, as Llama's does; it decodes to what it encoded."""
    # Slow imports, needed only when the demo is built.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=preset.vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=preset.context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: list[str]) -> Any:
    """All texts as one sequence of token ids `[tokens]`, each between `<s>` and `</s>`."""
    import torch  # slow, and only needed when the demo is built

    eos = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for text in encoded for token in (*text.ids, eos)])


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Compute with `count` threads, then with as many as before; None changes nothing."""
    import torch  # slow, and only needed when the demo is built

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_model(ids: Any, tokenizer: Any, preset: Preset, progress: Progress) -> Any:
    """A Llama-shaped model trained for a fixed number of steps (not by the clock, so that it is the same again)."""
    import torch  # slow, and only needed when the demo is built

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(tokenizer, preset)
        optimizer = torch.optim.AdamW(model.parameters(), lr=preset.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, preset.steps))
        for step, batch in enumerate(batches(ids, preset)):
            loss = next_token_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 9:
                progress(step + 1, preset.steps, f"pretraining the base model, loss {loss.item():.2f}")
    progress(preset.steps, preset.steps, "base model pretrained")
    return model.eval()


def new_model(tokenizer: Any, preset: Preset) -> Any:
    """An untrained Llama with tied embeddings, in fp32."""
    # Slow imports, needed only when the demo is built.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.key_value_heads,
        max_position_embeddings=preset.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).to(torch.float32).train()


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a twentieth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batches(ids: Any, preset: Preset) -> Iterator[Any]:
    """`preset.steps` batches `[batch, context]`: the text in shuffled windows, cut elsewhere on every pass."""
    import torch  # slow, and only needed when the demo is built

    generator = torch.Generator().manual_seed(0)
    windows: list[Any] = []
    for _ in range(preset.steps):
        while len(windows) < preset.batch:
            offset = int(torch.randint(preset.context, (1,), generator=generator))
            count = (len(ids) - offset) // preset.context
            if count < 1:
                raise DemoError(f"only {len(ids)} tokens of text to pretrain on: install more of the libraries")
            whole = ids[offset : offset + count * preset.context].view(count, preset.context)
            windows += list(whole[torch.randperm(count, generator=generator)])
        yield torch.stack(windows[: preset.batch])
        del windows[: preset.batch]


def save_quietly(model: Any, folder: Path) -> None:
    """Save without the library's own progress bar: what the user sees is the caller's to say."""
    from transformers.utils import logging  # slow, and only needed when the demo is built

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def next_token_loss(model: Any, ids: Any, reduction: str = "mean") -> Any:
    """Negative log-likelihood of tokens 1.. given those before; `ids` is `[batch, tokens]`."""
    import torch  # slow, and only needed when the demo is built

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def model_nll(model: Any, ids: Any, context: int) -> float:
    """Nats per token of `ids` in windows of `context` tokens; every token but the first is predicted once."""
    import torch  # slow, and only needed when the demo is built

    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, context - 1):
            total += next_token_loss(model, ids[None, start : start + context], reduction="sum").item()
    return total / (len(ids) - 1)


def unigram_nll(train: Any, held_out: Any, vocabulary: int) -> float:
    """Nats per token of `held_out[1:]` under the token frequencies of `train` (one added to each count)."""
    counts = train.bincount(minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[held_out[1:]].mean())
