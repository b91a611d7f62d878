"""Validates all data before any worker starts and reports every problem at once.

Each problem names file and line (or split and row), what was found and what to do. What does not prevent a run, such
as test texts that also occur in train, is a warning.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.config.benchmarks import Benchmark
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.sections import BaseModelConfig
from pipelines.config.tasks import RetentionCorpus, Source, TaskSource
from pipelines.data.benchmarks import load_benchmark, missing_suite
from pipelines.data.damage import silent_damage
from pipelines.data.encoding import Encoder
from pipelines.data.held_out import KEPT, trial_view, validation_view
from pipelines.data.kinds import kind_of
from pipelines.data.kinds.base import Kind, short
from pipelines.data.row_locations import files_of, row_location
from pipelines.data.sets import scored_length
from pipelines.data.sources import digest_of, load_split, records
from pipelines.errors import ConfigError, DataError, Problem, did_you_mean
from pipelines.models.gguf import described
from pipelines.preflight.cuts import cut_rows
from pipelines.preflight.samples import sample_problems

AT_MOST = 5  # rows named per kind of problem; the rest are counted
VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|[-+]?\d[\d.e+-]*")  # what differs between rows with the same kind of problem
SCARCE = 16  # texts up to this many characters are tokenized to see whether any token is left

Warn = Callable[[str], None]


def _silent(text: str) -> None:
    """Nobody wants to know what prevents no run."""


def check_trial_data(config: PipelineConfig) -> None:
    """Raise ConfigError with every problem of the data on which the trials of a training view are scored."""
    problems = check_data(trial_view(config, len(config.tasks)))
    if problems:
        raise ConfigError(Problem(f"search: {p.field}", p.message) for p in problems)


def check_data(config: PipelineConfig, warn: Warn = _silent) -> list[Problem]:
    """Every problem of a configuration's data.

    Args:
        warn: called with every finding that does not prevent a run.
    """
    tokenizer, context = _tokenizer(config.base_model), _context(config)
    problems: list[Problem] = []
    for section in ("tasks", "retention"):
        for number, source in enumerate(getattr(config, section)):
            if isinstance(source, Benchmark):
                problems += _benchmark_problems(f"retention.{number}", source, tokenizer)
                continue
            encoder = None
            length = scored_length(source, config, context)
            if length < 1:
                message = (
                    f"{source.max_new_tokens} leaves no room in the model's context of {context} tokens; lower it"
                )
                problems.append(Problem(f"{section}.{number}.max_new_tokens", message))
            elif tokenizer is not None:
                encoder = Encoder(tokenizer, length)
            splits = _splits(source, config)
            problems += _Check(f"{section}.{number}.data", source, encoder, warn).problems(splits)
    problems += sample_problems(config, tokenizer, context)
    if not problems and tokenizer is not None and warn is not _silent:
        for text in cut_rows(config, tokenizer, context):
            warn(text)
    return problems


def _benchmark_problems(field: str, benchmark: Benchmark, tokenizer) -> Iterator[Problem]:
    """Why a benchmark cannot be scored; loads its tasks and their data."""
    if reason := missing_suite():
        yield Problem(f"{field}.suite", reason)
        return
    if benchmark.chat_template and tokenizer is not None and not tokenizer.chat_template:
        yield Problem(f"{field}.chat_template", "the base's tokenizer has no chat template; set it to false")
    try:
        load_benchmark(benchmark)
    except DataError as error:
        yield Problem(f"{field}.tasks", str(error))


def _splits(source: Source, config: PipelineConfig) -> list[str]:
    """The splits that a run reads; held-out rows are part of `train`."""
    if isinstance(source, RetentionCorpus):
        return [source.split]
    validated = config.training.validate_every and KEPT not in validation_view(source).splits.get("train", "")
    return ["train", "test", *(["validation"] if validated else [])]


def tokenizer_of_chats(config: PipelineConfig):
    """The base's tokenizer if a task has chats, which its template renders; else None."""
    chats = any(getattr(task, "is_chat", False) for task in config.tasks)
    return _tokenizer(config.base_model) if chats else None


def _tokenizer(base: BaseModelConfig):
    """The base's tokenizer; None if it cannot be loaded, which the checks of the model report."""
    import transformers  # slow

    try:
        base = described(base)
        return transformers.AutoTokenizer.from_pretrained(
            base.path, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError):
        return None


def _context(config: PipelineConfig) -> int:
    """Context of the base in tokens, as the workers determine it."""
    import transformers  # slow

    from pipelines.models.base import context_length  # imports torch

    try:
        base = described(config.base_model)
        found = transformers.AutoConfig.from_pretrained(
            base.path, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError):
        return config.training.max_length + 10**6  # unknown: no limit
    return context_length(found)


@dataclass
class BadRows:
    """Rows of a split that have one kind of problem.

    Attributes:
        reason: what is wrong with the first of them.
        rows: numbers of the first `AT_MOST`, counted from 0.
    """

    reason: str
    rows: list[int] = field(default_factory=list)
    count: int = 0

    def add(self, row: int) -> None:
        self.count += 1
        if len(self.rows) < AT_MOST:
            self.rows.append(row)

    def others(self) -> str:
        """Where the rows after the first are, in parentheses; empty if there are none."""
        if self.count == 1:
            return ""
        named = ", ".join(str(row + 1) for row in self.rows[1:])
        more = f" and {self.count - len(self.rows):,} more" if self.count > len(self.rows) else ""
        return f" (also row{'s' if self.count > 2 else ''} {named}{more})"


class _Check:
    """The checks of one task or corpus."""

    def __init__(self, field: str, source: Source, encoder: Encoder | None, warn: Warn):
        self.field, self.source, self.encoder, self.warn = field, source, encoder, warn
        self.kind: Kind = kind_of(source)
        self.found: list[Problem] = []
        self.train_is_readable = False
        self.class_names: tuple[str, ...] = ()
        self.seen: set[int] = set()  # classes that occur in train

    def problems(self, splits: Sequence[str]) -> list[Problem]:
        whole = [self._split(split) for split in splits]
        if all(whole):
            self._task()
            if not isinstance(self.source, RetentionCorpus):
                self._overlap()
        return self.found

    def _add(self, message: str) -> None:
        self.found.append(Problem(self.field, message))

    def _split(self, split: str) -> bool:
        """Check one split; whether its rows can be read and have all columns."""
        before = len(self.found)
        try:
            rows = load_split(self.source, split)
            damage = [problem for path in files_of(self.source, split) for problem in silent_damage(path)]
            if damage:
                raise DataError(damage)
            digest_of(self.source, split)  # reads all columns, also those that no task names
            names = rows.column_names
            wanted = self.kind.columns(self.source)
            for column in wanted:
                if column not in names:
                    where = f"{self.source.name}/{split}"
                    self._add(f"{where} has no column '{column}', {did_you_mean(column, names)}")
            if len(self.found) == before:
                if split == "train":
                    self.train_is_readable, self.class_names = True, self.kind.classes(self.source)
                    for hint in self.kind.unused_columns(self.source, names):
                        self.warn(f"{self.source.name}/{split}: {hint}")
                self._rows(split, rows, wanted)
        except DataError as error:
            for problem in error.problems:
                self._add(str(problem))
        except UnicodeDecodeError as error:
            self._add(f"{self.source.name}/{split}: a text holds bytes that are not UTF-8 ({error}); write it anew")
        return len(self.found) == before

    def _rows(self, split: str, rows, columns: list[str]) -> None:
        read, classes, empty = self._reader(), Counter(), 0
        bad: dict[str, BadRows] = {}  # kind of problem → the rows that have it
        for number, row in enumerate(records(rows, columns)):
            reasons = list(self._row(split, row, read, classes))
            empty += not reasons and not self.kind.text(self.source, row).strip()
            for reason in reasons:
                kind = VALUE.sub(lambda value: value[0] if value[0][1:-1] in columns else "…", reason)
                bad.setdefault(kind, BadRows(reason)).add(number)
        for found in bad.values():
            self._add(f"{row_location(self.source, split, found.rows[0])}: {found.reason}{found.others()}")
        if not bad:
            self._split_as_a_whole(split, len(rows), classes, empty)

    def _reader(self) -> Callable[[dict], int | None] | None:
        """Reads labels; None where there are none, or where those of train could not be read."""
        return self.kind.reader(self.source) if _has_label(self.source) and self.train_is_readable else None

    def _row(self, split: str, row: dict, read, classes: Counter) -> Iterator[str]:
        reasons = list(self.kind.row_problems(self.source, row))
        yield from reasons
        if read is not None and (self.class_names or not reasons):  # the choices of an invalid row cannot be read
            value = row[self.source.label]
            label = read(row)
            if label is None:
                yield self._unknown_label(value)
            else:
                classes[label] += 1
        if not reasons and self.encoder is not None:
            yield from self.kind.rendering_problems(self.source, row, self.encoder, split == "train")
            yield from self._vanishing(row)

    def _unknown_label(self, value: Any) -> str:
        if value is None or value != value:
            what = "missing" if value is None else "NaN"
            return f"the label '{self.source.label}' is {what}; fill it or drop the row"
        names = ", ".join(map(repr, self.class_names[:8]))
        known = f"the label set ({names})" if names else "the choices"
        return f"label {short(value)} is outside {known}; fix it or set labels:"

    def _vanishing(self, row: dict) -> Iterator[str]:
        """Whether no token is left of a short text."""
        text = self.kind.text(self.source, row)
        if text.strip() and len(text) <= SCARCE and not self.encoder.bare([text])[0]:
            yield f"{text!r} has no tokens; write it in characters that the tokenizer knows"

    def _split_as_a_whole(self, split: str, count: int, classes: Counter, empty: int) -> None:
        where = f"{self.source.name}/{split}"
        if empty == count:
            self._add(f"{where}: all {count} texts are empty; check the column")
        elif empty and isinstance(self.source, TaskSource):
            self.warn(f"{where}: {empty} of {count} texts are empty and are of no use")
        if len(classes) == 1 and self.class_names:
            name = self.class_names[next(iter(classes))]
            message = f"{where}: all {count} rows have the same label '{name}'"
            if split == "train":
                self._add(f"{message}; add rows of other classes")
            else:
                self.warn(f"{message}; scores on it mean little")
        if split == "train":
            self.seen = set(classes)
        elif self.seen and self.class_names and (unseen := sorted(set(classes) - self.seen)):
            names = ", ".join(f"'{self.class_names[c]}'" for c in unseen[:8])
            self._add(f"{where}: the label(s) {names} never occur in train; add rows to train or drop them here")

    def _task(self) -> None:
        for message in self.kind.task_problems(self.source, self.encoder):
            self._add(message)

    def _overlap(self) -> None:
        """Warn of test rows whose input also occurs in train."""
        columns = self.kind.inputs(self.source)

        def marks(split: str) -> Iterator[bytes]:
            for row in records(load_split(self.source, split), columns):
                text = " ".join(self.kind.text(self.source, row).split())
                if text:
                    yield hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()

        tested = Counter(marks("test"))
        shared = tested.keys() & {mark for mark in marks("train") if mark in tested}
        if shared:
            count = sum(tested[mark] for mark in shared)
            self.warn(
                f"{self.source.name}: {count} of {tested.total()} test texts also occur in train; "
                "scores on them measure memorisation; remove them from one of the two"
            )


def _has_label(source: Source) -> bool:
    return getattr(source, "label", None) is not None
