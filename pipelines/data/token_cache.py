"""Caches encoded sequences in memory-mapped Arrow files, made once per node."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from pipelines.data.encoding import Encoded, Encoder, tokenizer_fingerprint
from pipelines.data.node_cache import cache_folder, node_lock, published

FORMAT = 2  # of the cached files; another number invalidates them
WRITE_ROWS = 1000  # sequences per record batch
WHOLE, TOKENS = ("example", "start", "choice", "cut"), ("input_ids", "breaks", "gaps")  # columns by type


class Sequences(Sequence):
    """Encoded sequences in a memory-mapped Arrow file, one per row."""

    def __init__(self, path: Path):
        import pyarrow  # slow

        self.file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        counts = [self.file.get_batch(i).num_rows for i in range(self.file.num_record_batches)]
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        part = int(np.searchsorted(self.ends, index, side="right"))
        batch, row = self.file.get_batch(part), index - (int(self.ends[part - 1]) if part else 0)
        example, start, choice, cut = (int(batch.column(name)[row].as_py()) for name in WHOLE)
        ids, breaks, gaps = (batch.column(name)[row].values for name in TOKENS)
        return Encoded(example, ids.to_numpy(), start, choice, tuple(breaks.to_pylist()), tuple(gaps.to_pylist()), cut)

    def numbers(self, name: str) -> np.ndarray:
        """A column of whole numbers, or `lengths`: tokens per sequence."""
        import pyarrow.compute as pc  # slow

        parts = [self.file.get_batch(i) for i in range(self.file.num_record_batches)]
        lengths = name == "lengths"
        columns = [pc.list_value_length(p.column("input_ids")) if lengths else p.column(name) for p in parts]
        return np.concatenate([column.to_numpy() for column in columns]) if columns else np.empty(0, dtype=np.int64)

    @property
    def last_example(self) -> int:
        """The largest example number; -1 if there are no sequences."""
        return self[len(self) - 1].example if len(self) else -1


def cached_sequences(identity: dict, encoder: Encoder, make: Callable[[], Iterable[Encoded]]) -> Sequences:
    """The sequences that `make` yields, from the node's cache if some process has made them before.

    Args:
        identity: everything that the sequences depend on besides the encoder.
    """
    tokens = [FORMAT, encoder.max_length, tokenizer_fingerprint(encoder.tokenizer)]
    key = hashlib.sha256(json.dumps([tokens, identity], sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = cache_folder("tokens") / f"{key}.arrow"
    with node_lock(f"tokens-{key}"):
        if not path.exists():
            with published(path) as temporary:
                _write(make(), temporary)
    return Sequences(path)


def _write(sequences: Iterable[Encoded], path: Path) -> None:
    import pyarrow  # slow

    types = dict.fromkeys(WHOLE, pyarrow.int64()) | dict.fromkeys(TOKENS, pyarrow.list_(pyarrow.int32()))
    schema, source = pyarrow.schema(list(types.items())), iter(sequences)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        while part := list(itertools.islice(source, WRITE_ROWS)):
            columns = [pyarrow.array([getattr(item, name) for item in part], types[name]) for name in types]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
