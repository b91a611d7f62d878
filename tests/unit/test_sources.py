"""Rows from every kind of place and format: the same rows, in order, read once a node, at bounded cost."""

import json
import multiprocessing
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pipelines.config.loading import parse_config
from pipelines.data import sources
from pipelines.data.files import local_copy
from pipelines.data.held_out import validation_view
from pipelines.data.row_locations import row_location
from pipelines.data.sources import batches, digest_of, load_split, records
from pipelines.errors import DataError
from tests.conftest import minimal, write_jsonl

ROWS = [{"sentence": f"row {i}, with „quotes“", "label": i % 2} for i in range(40)]


def source(data, **task):
    raw = minimal(Path("/nowhere"), data)
    raw["tasks"][0] |= task
    return parse_config(raw).tasks[0]


def write(folder: Path, form: str, rows=ROWS, name: str = "train") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.{form}"
    if form == "jsonl":
        write_jsonl(file, rows)
    elif form == "json":
        file.write_text(json.dumps(rows))
    elif form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        separator = {"csv": ",", "tsv": "\t"}[form]
        lines = [separator.join(rows[0])]
        lines += [separator.join(f'"{value}"' for value in row.values()) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows_in_order(tmp_path, form):
    write(tmp_path / form, form)
    rows = list(records(load_split(source(tmp_path / form), "train")))
    assert [row["sentence"] for row in rows] == [row["sentence"] for row in ROWS]
    assert [int(row["label"]) for row in rows] == [row["label"] for row in ROWS]


@pytest.mark.parametrize("layout", ["train-{:05d}-of-00002", "train/{:05d}"])
def test_parts_of_a_split_are_read_by_name(tmp_path, layout):
    for part in (1, 0):
        file = tmp_path / "d" / f"{layout.format(part)}.jsonl"
        write(file.parent, "jsonl", ROWS[part * 20 : part * 20 + 20], file.stem)
    assert [row["sentence"] for row in records(load_split(source(tmp_path / "d"), "train"))] == [
        row["sentence"] for row in ROWS
    ]
    assert row_location(source(tmp_path / "d"), "train", 21).endswith(f"{layout.format(1)}.jsonl:2")


def test_text_is_a_document_a_paragraph_or_a_document_a_file(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "train.txt").write_text("first\nstill first\n\nsecond\n")
    inner = tmp_path / "many" / "train"
    inner.mkdir(parents=True)
    for name, text in (("b", "two\n\nstill two"), ("a", "one")):
        (inner / f"{name}.txt").write_text(text)
    read = {
        n: [r["text"].strip() for r in records(load_split(source(tmp_path / n), "train"))] for n in ("one", "many")
    }
    assert read == {"one": ["first\nstill first", "second"], "many": ["one", "two\n\nstill two"]}


def test_a_table_keeps_words_that_look_like_missing_values_and_leading_zeros(tmp_path):
    write(tmp_path / "d", "csv", [{"sentence": "NA", "label": "007"}, {"sentence": "null", "label": "1"}])
    assert list(records(load_split(source(tmp_path / "d"), "train"))) == [
        {"sentence": "NA", "label": "007"},
        {"sentence": "null", "label": "1"},
    ]


def test_split_expressions_reach_into_folders(tmp_path):
    write(tmp_path / "d", "jsonl", name="validation")
    task = source(tmp_path / "d", splits={"test": "validation[:10]"})
    assert [row["sentence"] for row in load_split(task, "test")] == [row["sentence"] for row in ROWS[:10]]


def test_digest_depends_on_content_and_order_not_on_place_or_form(tmp_path):
    write(tmp_path / "a", "jsonl")
    write(tmp_path / "b", "parquet")
    write(tmp_path / "c", "jsonl", [*ROWS[1:], ROWS[0]])
    write(tmp_path / "d", "jsonl", [*ROWS[:-1], ROWS[-1] | {"sentence": "another last row"}])
    a, b, c, d = (digest_of(source(tmp_path / name), "train") for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_digest_is_stable_over_machines_and_versions(tmp_path):
    write(tmp_path / "a", "jsonl", [{"text": "naïve ☃", "label": 1}])
    # sha256 of '{"label": 1, "text": "na\\u00efve \\u2603"}\n'
    assert digest_of(source(tmp_path / "a"), "train") == "e0c072d9455f86c5a5652b86884a46bd"


def test_batches_hold_all_rows_in_order_across_reopened_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH", 3)
    monkeypatch.setattr(sources, "REOPEN_ROWS", 7)
    write(tmp_path / "a", "jsonl")
    rows = load_split(source(tmp_path / "a"), "train")
    assert [t for batch in batches(rows, ["sentence"]) for t in batch["sentence"]] == [r["sentence"] for r in ROWS]
    odd = rows.select(range(1, 40, 2))
    assert [row["sentence"] for row in records(odd)] == [r["sentence"] for r in ROWS[1::2]]


def test_rows_are_memory_mapped(tmp_path):
    write(tmp_path / "a", "jsonl")
    rows = load_split(source(tmp_path / "a"), "train")
    assert rows.cache_files
    assert pyarrow.total_allocated_bytes() < 10_000_000


# -- remote


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv"])
def test_a_bucket_is_a_folder_like_any_other(tmp_path, bucket, form):
    write(tmp_path / form, form)
    bucket.put(str(tmp_path / form / f"train.{form}"), f"tasks/{form}/train.{form}")
    bucket.pipe_file(f"tasks/{form}/labels.json", b'["no", "yes"]')
    here, there = source(tmp_path / form), source(f"s3://tasks/{form}")
    assert digest_of(there, "train") == digest_of(here, "train")
    from pipelines.data.kinds.classification import label_set

    assert label_set(there).names == ("no", "yes")
    if form != "parquet":
        assert row_location(there, "train", 4) == f"s3://tasks/{form}/train.{form}:{5 if form == 'jsonl' else 6}"


def test_what_is_missing_in_a_bucket_is_named(bucket):
    with pytest.raises(DataError, match=r"s3://tasks/nothing/train.jsonl: no such file"):
        load_split(source("s3://tasks/nothing"), "train")
    with pytest.raises(DataError, match=r"cannot be read|no such file"):
        load_split(source("s3://no-such-bucket/rows.jsonl"), "train")


def test_an_unknown_protocol_is_named():
    with pytest.raises(DataError, match="Protocol not known"):
        load_split(source("nosuch://bucket/rows.jsonl"), "train")


def test_a_changed_object_is_fetched_again(tmp_path, bucket):
    bucket.pipe_file("tasks/changing/train.jsonl", b'{"sentence": "old", "label": 0}\n')
    before = Path(local_copy("s3://tasks/changing/train.jsonl")).read_bytes()
    bucket.pipe_file("tasks/changing/train.jsonl", b'{"sentence": "newer", "label": 0}\n')
    bucket.invalidate_cache()
    after = Path(local_copy("s3://tasks/changing/train.jsonl")).read_bytes()
    assert (b"old" in before, b"newer" in after) == (True, True)


def _fetch(path: str, counter: str, together) -> None:
    """In a worker process: note each real download in a file of its own."""
    import s3fs

    fetch = s3fs.S3FileSystem.get_file

    def counted(self, *arguments, **options):
        Path(counter, str(os.getpid())).touch()
        return fetch(self, *arguments, **options)

    s3fs.S3FileSystem.get_file = counted
    together.wait()
    local_copy(path)


def test_the_workers_of_a_node_download_once(tmp_path, bucket):
    bucket.pipe_file("tasks/once/train.jsonl", b'{"sentence": "x", "label": 0}\n' * 20_000)
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    arguments = ("s3://tasks/once/train.jsonl", str(tmp_path), together)
    workers = [context.Process(target=_fetch, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_those_who_choose_see_validation_and_never_test(tmp_path):
    write(tmp_path / "with", "jsonl")
    write(tmp_path / "with", "jsonl", ROWS[:5], "validation")
    write(tmp_path / "with", "jsonl", ROWS[:3], "test")
    view = validation_view(source(tmp_path / "with"))
    assert len(load_split(view, "test")) == 5
    assert len(load_split(view, "train")) == len(ROWS)


def test_without_validation_a_tenth_of_train_is_held_out_of_it(tmp_path):
    write(tmp_path / "without", "jsonl")
    write(tmp_path / "without", "jsonl", ROWS[:3], "test")
    view = validation_view(source(tmp_path / "without"))
    kept, held_out = (list(records(load_split(view, split))) for split in ("train", "test"))
    assert len(held_out) == len(ROWS) // 10
    sentences = sorted(row["sentence"] for row in [*kept, *held_out])
    assert sentences == sorted(row["sentence"] for row in ROWS)
    assert digest_of(view, "train") != digest_of(source(tmp_path / "without"), "train")
    assert "row" in row_location(view, "test", 1)
