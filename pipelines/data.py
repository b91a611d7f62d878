"""Rows in, token sequences out: load, validate, digest and tokenise what a configuration names.

Rows stay in memory-mapped `datasets`; everything is a pure function of (source, split, seed), so that every worker
of every run sees the same examples in the same order. A row of a classification task looks like
`{"sentence": "a charming journey", "label": 1}`, of a text task like `{"text": "…"}`.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curlora.continual.strategy import Example
from pipelines.config import (
    ClassificationTask,
    LanguageModelingTask,
    PipelineConfig,
    Problem,
    RetentionCorpus,
    Source,
    did_you_mean,
    is_uri,
    looks_local,
)

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
CARVED = 0.1  # share of a single file that becomes its test split


class DataError(ValueError):
    """Data that cannot be used; carries the problems found."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


# -- loading


def load_split(source: Source, split: str) -> datasets.Dataset:
    """The rows of one split.

    Raises:
        DataError: nothing there, not readable, or no rows; names the file and, for broken JSON, the line.
    """
    return _load(source.data, source.subset, source.revision, getattr(source, "splits", {}).get(split, split), split)


@lru_cache(maxsize=64)
def _load(data: str, subset: str | None, revision: str | None, expression: str, split: str) -> datasets.Dataset:
    # datasets takes a second to import: only commands that read data pay for it
    import datasets

    datasets.disable_progress_bars()
    if is_uri(data) or looks_local(data):
        rows = _load_files(data, expression, split)
    else:
        rows = _load_hub(data, subset, revision, expression)
    if len(rows) == 0:
        raise DataError([Problem(f"{data}:{split}", "the split is empty; give it at least one row")])
    return rows


def _load_files(data: str, expression: str, split: str) -> datasets.Dataset:
    if data.endswith((".jsonl", ".json")):
        rows = _read_jsonl(data)
        if split not in ("train", "test"):
            raise DataError([Problem(data, f"one file has no '{split}' split; use a folder with {split}.jsonl")])
        if len(rows) < 2:
            return rows
        return rows.train_test_split(test_size=CARVED, seed=0, shuffle=True)[split]
    return _read_jsonl(posixpath.join(data, f"{expression}.jsonl"))


def _read_jsonl(path: str) -> datasets.Dataset:
    import datasets
    import fsspec

    fs, plain = fsspec.core.url_to_fs(path)
    if not fs.exists(plain):
        there = [posixpath.basename(p) for p in fs.ls(posixpath.dirname(plain), detail=False)] if _is_dir(path) else []
        remedy = f"the folder holds: {', '.join(sorted(there))}" if there else "check the path"
        raise DataError([Problem(path, f"no such file; {remedy}")])
    if fs.size(plain) == 0:
        return datasets.Dataset.from_dict({})
    try:
        return datasets.load_dataset("json", data_files={"rows": path}, split="rows")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise DataError(_broken_lines(path) or [Problem(path, f"not readable as JSONL: {error}")]) from error


def _is_dir(path: str) -> bool:
    import fsspec

    fs, plain = fsspec.core.url_to_fs(posixpath.dirname(path))
    return fs.isdir(plain)


def _broken_lines(path: str, at_most: int = 5) -> list[Problem]:
    """Where JSON is broken, by line: `datasets` only says that it is."""
    import fsspec

    problems = []
    with fsspec.open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8")) if line.strip() else {}
                reason = None if isinstance(row, dict) else f"expected an object, found {type(row).__name__}"
            except ValueError as error:
                reason = f"not valid JSON in UTF-8 ({error})"
            if reason:
                problems.append(Problem(f"{path}:{number}", f"{reason}; mend or delete the line"))
            if len(problems) == at_most:
                break
    return problems


def _load_hub(data: str, subset: str | None, revision: str | None, expression: str) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(data, subset, revision=revision, split=expression)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            [Problem(data, f"neither a local path nor a readable hub dataset ({reason}); check the spelling")]
        ) from error


def digest(rows: datasets.Dataset) -> str:
    """SHA-256 of all rows in order, as canonical JSON: the same on every machine. 32 hex digits."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode())
        sha.update(b"\n")
    return sha.hexdigest()[:32]


@lru_cache(maxsize=64)
def split_digest(data: str, subset: str | None, revision: str | None, expression: str, split: str) -> str:
    return digest(_load(data, subset, revision, expression, split))


def digest_of(source: Source, split: str) -> str:
    """Digest of a source's split (computed once a process)."""
    expression = getattr(source, "splits", {}).get(split, split)
    return split_digest(source.data, source.subset, source.revision, expression, split)


def subset_indices(count: int, at_most: int | None, seed: int) -> np.ndarray:
    """A seeded sample of row numbers in ascending order; all of them where `at_most` does not bind."""
    if at_most is None or at_most >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, count]).choice(count, at_most, replace=False))


# -- labels


@dataclass(frozen=True)
class LabelSet:
    """Class names in order, and the class index of every raw label value."""

    names: tuple[str, ...]
    index: dict[Any, int]

    def __len__(self) -> int:
        return len(self.names)


def label_set(task: ClassificationTask) -> LabelSet:
    """The classes of a task: `labels:` in the configuration, else labels.json beside the data, the hub's class
    names, or the values that occur in train."""
    if isinstance(task.labels, dict):
        return LabelSet(tuple(task.labels.values()), {raw: i for i, raw in enumerate(task.labels)})
    names = task.labels or _labels_file(task.data)
    if names is None:
        rows = load_split(task, "train")
        feature = rows.features.get(task.label)
        names = getattr(feature, "names", None)
        if names is None:
            values = sorted(set(rows[task.label]), key=lambda value: (str(type(value)), value))
            return LabelSet(tuple(map(str, values)), {value: i for i, value in enumerate(values)})
    index: dict[Any, int] = {i: i for i in range(len(names))}
    index.update({name: i for i, name in enumerate(names)})
    return LabelSet(tuple(names), index)


def _labels_file(data: str) -> list[str] | None:
    path = Path(data) / "labels.json"
    return json.loads(path.read_text(encoding="utf-8")) if not is_uri(data) and path.is_file() else None


# -- at the door


def check_data(config: PipelineConfig) -> list[Problem]:
    """Every problem with the data of a configuration, before any worker starts."""
    problems: list[Problem] = []
    for number, task in enumerate(config.tasks):
        for split in ("train", "test"):
            problems += _check_split(f"tasks.{number}.data", task, split)
    for number, corpus in enumerate(config.retention):
        problems += _check_split(f"retention.{number}.data", corpus, corpus.split)
    return problems


def _check_split(field: str, source: Source, split: str, at_most: int = 5) -> list[Problem]:
    try:
        rows = load_split(source, split)
        wanted = _columns(source)
        missing = [
            Problem(field, f"{source.name}/{split} has no column '{c}', {did_you_mean(c, rows.column_names)}")
            for c in wanted
            if c not in rows.column_names
        ]
        if missing:
            return missing
        problems = []
        for reason in _bad_rows(source, rows, split):
            problems.append(Problem(field, reason))
            if len(problems) == at_most:
                break
        return problems
    except DataError as error:
        return [Problem(field, str(problem)) for problem in error.problems]


def _columns(source: Source) -> list[str]:
    if isinstance(source, RetentionCorpus):
        return [source.text]
    if isinstance(source, ClassificationTask):
        if source.head == "verbalizer":
            return [*template_fields(source.prompt), source.label]
        return [*source.text_fields, source.label]
    return source.text_fields


def _bad_rows(source: Source, rows: datasets.Dataset, split: str) -> Iterator[str]:
    texts = [c for c in _columns(source) if c != getattr(source, "label", None)]
    for column in texts:
        for line, value in enumerate(rows[column], 1):
            if not isinstance(value, str):
                yield f"{split} row {line}: '{column}' is {_kind(value)}, expected text; fill it or drop the row"
    if isinstance(source, ClassificationTask):
        labels = label_set(source)
        for line, value in enumerate(rows[source.label], 1):
            if value not in labels.index:
                names = ", ".join(f"{raw!r}" for raw in list(labels.index)[: 2 * len(labels)][:8])
                yield f"{split} row {line}: label {value!r} is outside the label set ({names}); fix it or set labels:"
        if source.verbalizer and len(source.verbalizer) != len(labels):
            yield f"verbalizer has {len(source.verbalizer)} texts for {len(labels)} labels; give one each"


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def template_fields(template: str) -> list[str]:
    """Field names of a `"… {field} …"` template."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


# -- encoding for training


def training_examples(
    task: ClassificationTask | LanguageModelingTask,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    at_most: int | None,
    seed: int,
) -> list[Example]:
    """A task's training split as token sequences of at most `max_length`."""
    rows = load_split(task, "train")
    rows = rows.select(subset_indices(len(rows), at_most, seed))
    if isinstance(task, LanguageModelingTask):
        return _packed(task, rows, tokenizer, max_length)
    labels = label_set(task)
    if task.head == "classifier":
        encoded = encode_texts(tokenizer, joined_texts(task, rows), max_length)
        targets = (labels.index[raw] for raw in rows[task.label])
        return [Example(task.name, tuple(ids), target=y) for ids, y in zip(encoded, targets, strict=True)]
    answers = label_tokens(task, labels, tokenizer)
    examples = []
    for row in rows:
        answer = answers[labels.index[row[task.label]]]
        prompt = prompt_tokens(task, row, tokenizer, max_length - len(answer))
        examples.append(Example(task.name, (*prompt, *answer), labels=(*[IGNORE] * len(prompt), *answer)))
    return examples


def joined_texts(task: ClassificationTask, rows: datasets.Dataset) -> list[str]:
    return ["\n".join(parts) for parts in zip(*(rows[field] for field in task.text_fields), strict=True)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids by the tokenizer's own rules for bos and eos, cut at the right; never empty."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return [ids or [end_token(tokenizer)] for ids in encoded]


def prompt_tokens(task: ClassificationTask, row: dict, tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    """The filled template, cut at its *start* if it is too long, so that the question and the label text stay."""
    ids = tokenizer(task.prompt.format(**row))["input_ids"]
    return ids[-room:] or [end_token(tokenizer)]


def label_tokens(
    task: ClassificationTask, labels: LabelSet, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """Token ids of each label's text as it follows the prompt (a space between, unless the prompt ends with one)."""
    space = "" if task.prompt[-1:].isspace() else " "
    texts = [space + text for text in (task.verbalizer or labels.names)]
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return token
    return 0


def token_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: bool) -> np.ndarray:
    """All documents one after another as (tokens,) int64; `end` puts an end token after each."""
    parts: list[np.ndarray] = []
    ending = np.array([end_token(tokenizer)] if end else [], dtype=np.int64)
    for start in range(0, len(texts), 1000):
        # verbose=False: a long document is no mistake here, it is cut into windows afterwards
        encoded = tokenizer(list(texts[start : start + 1000]), verbose=False)["input_ids"]
        for ids in encoded:
            parts += [np.asarray(ids, dtype=np.int64), ending]
    return np.concatenate(parts)


def _packed(task: LanguageModelingTask, rows, tokenizer, max_length: int) -> list[Example]:
    stream = token_stream(rows[task.text], tokenizer, end=True)
    blocks = (stream[start : start + max_length] for start in range(0, len(stream), max_length))
    return [Example(task.name, tuple(b.tolist()), labels=tuple(b.tolist())) for b in blocks if len(b) > 1]


# -- encoding for evaluation


@dataclass(frozen=True)
class EvaluationItem:
    """One sequence to score.

    Attributes:
        example: number of the example it belongs to (an example may have one sequence a label).
        input_ids: (length,) tokens.
        start: position of the first token whose likelihood counts; 0 for a classifier head.
        choice: label index for a verbalizer, else -1.
    """

    example: int
    input_ids: np.ndarray
    start: int = 0
    choice: int = -1


@dataclass(frozen=True)
class EvaluationSet:
    """What one score cell is computed from. `labels` has one class index an example (empty for text)."""

    name: str
    kind: str  # classifier | verbalizer | text
    metric: str
    items: tuple[EvaluationItem, ...]
    labels: tuple[int, ...]
    row_numbers: tuple[int, ...]
    class_names: tuple[str, ...]
    digest: str


def evaluation_set(
    source: ClassificationTask | LanguageModelingTask | RetentionCorpus,
    tokenizer: PreTrainedTokenizerBase,
    config: PipelineConfig,
    context: int,
) -> EvaluationSet:
    """The test split of a task, or a retention corpus, encoded for scoring.

    Args:
        context: the model's context in tokens; the default window of a retention corpus (at most 1024).
    """
    if isinstance(source, RetentionCorpus):
        rows = load_split(source, source.split)
        window = min(source.window or 1024, context)
        texts = [text + "\n" for text in rows[source.text]]
        stream = token_stream(texts, tokenizer, end=False)
        items = windows(stream, window, source.stride or max(1, window // 2))
        return _text_set(source, items, digest_of(source, source.split))
    rows = load_split(source, "test")
    numbers = subset_indices(len(rows), config.evaluation.max_examples, config.training.seed)
    rows = rows.select(numbers)
    max_length = min(config.training.max_length, context)
    if isinstance(source, LanguageModelingTask):
        stream = token_stream(rows[source.text], tokenizer, end=True)
        return _text_set(source, windows(stream, max_length, max(1, max_length // 2)), digest_of(source, "test"))
    labels = label_set(source)
    if source.head == "classifier":
        encoded = encode_texts(tokenizer, joined_texts(source, rows), max_length)
        items = [EvaluationItem(i, np.asarray(ids)) for i, ids in enumerate(encoded)]
    else:
        items = _choices(source, rows, labels, tokenizer, max_length)
    return EvaluationSet(
        name=source.name,
        kind=source.head,
        metric=source.metric,
        items=tuple(items),
        labels=tuple(labels.index[raw] for raw in rows[source.label]),
        row_numbers=tuple(int(n) for n in numbers),
        class_names=labels.names,
        digest=digest_of(source, "test"),
    )


def _text_set(source, items: list[EvaluationItem], digest: str) -> EvaluationSet:
    numbers = tuple(range(len(items)))
    return EvaluationSet(source.name, "text", "nll", tuple(items), (), numbers, (), digest)


def _choices(task, rows, labels: LabelSet, tokenizer, max_length: int) -> list[EvaluationItem]:
    answers = label_tokens(task, labels, tokenizer)
    room = max_length - max(map(len, answers))
    items = []
    for i, row in enumerate(rows):
        prompt = prompt_tokens(task, row, tokenizer, room)
        for choice, answer in enumerate(answers):
            items.append(EvaluationItem(i, np.asarray((*prompt, *answer)), start=len(prompt), choice=choice))
    return items


def windows(stream: np.ndarray, window: int, stride: int) -> list[EvaluationItem]:
    """Overlapping windows that score every token but the first exactly once.

    Every window but the first sees `window − stride` tokens of context before the first token it scores.
    """
    items = []
    scored = 1  # nothing comes before the first token
    while scored < len(stream):
        end = min(len(stream), window if scored == 1 else scored + stride)
        begin = max(0, end - window)
        items.append(EvaluationItem(len(items), stream[begin:end], start=scored - begin))
        scored = end
    return items


def majority_rate(labels: Sequence[int]) -> float | None:
    """Accuracy of always answering the most frequent class of these labels."""
    if not labels:
        return None
    return float(np.bincount(labels).max() / len(labels))
