"""Tasks of the demo on a real model: made from installed packages, disjoint, and without their own answers."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.demo import pretrained
from pipelines.demo.presets import Library
from pipelines.errors import DemoError

SIZES = pretrained.Sizes(
    libraries=(Library("huggingface_hub", "huggingface_hub"), Library("fsspec", "fsspec")),
    functions=Library("fsspec", "fsspec"),
    text=Library("click", "click"),
    retention=(Library("networkx", "networkx"),),
    passages=(20, 4, 6),
    summaries=(8, 2, 4),
    text_characters=(8_000, 2_000, 2_000),
    retention_characters=4_000,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def assets(cache):
    return pretrained.prepare_tasks(Path("base"), cache, sizes=SIZES)


def rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_sizes_are_as_asked_and_no_row_is_in_two_splits(assets):
    assert assets.tasks.keys() == {"library", "summary", "click"}
    for name, sizes in (("library", SIZES.passages), ("summary", SIZES.summaries)):
        splits = [rows(assets.tasks[name], split) for split in ("train", "validation", "test")]
        assert tuple(map(len, splits)) == sizes
        texts = [json.dumps(row) for split in splits for row in split]
        assert len(texts) == len(set(texts))


def test_libraries_come_in_equal_numbers_and_their_passages_do_not_name_them(assets):
    labels = json.loads((assets.tasks["library"] / "labels.json").read_text())
    train = rows(assets.tasks["library"], "train")
    assert {sum(row["label"] == label for row in train) for label in range(len(labels))} == {10}
    for row in train:
        assert labels[row["label"]] not in row["text"].lower()
        assert len(row["text"]) <= pretrained.PASSAGE_CHARACTERS


def test_a_chat_shows_a_function_without_the_sentence_that_is_asked_for(assets):
    for row in rows(assets.tasks["summary"], "train"):
        asked, answer = (message["content"] for message in row["messages"])
        tree = ast.parse(asked.removeprefix(pretrained.TEMPLATE.format(code="")))
        assert isinstance(tree.body[0], ast.FunctionDef) and ast.get_docstring(tree.body[0]) is None
        assert answer not in asked
        assert answer.endswith(".") and answer[0].isupper() and "`" not in answer


def test_a_second_call_reads_nothing(assets, cache, monkeypatch):
    monkeypatch.setattr(pretrained, "_write", None)
    assert pretrained.prepare_tasks(Path("base"), cache, sizes=SIZES).root == assets.root


def test_a_missing_library_is_named(cache):
    sizes = replace(SIZES, text=Library("no-such-distribution", "no_such_package"))
    with pytest.raises(DemoError, match=r"'no_such_package'.* pip install no-such-distribution"):
        pretrained.prepare_tasks(Path("base"), cache, sizes=sizes)
    assert len(list(cache.glob("pretrained-*"))) == 1


def test_too_little_documentation_is_refused(cache):
    with pytest.raises(DemoError, match="fsspec has only"):
        pretrained.prepare_tasks(Path("base"), cache, sizes=replace(SIZES, summaries=(10_000, 2, 4)))


def test_shipped_sizes_can_be_had(tmp_path):
    found = pretrained.prepare_tasks(Path("base"), tmp_path)
    assert tuple(len(rows(found.tasks["summary"], s)) for s in ("train", "validation", "test")) == (96, 20, 32)
