"""The inbox: what a listing says of a domain, and what in it is refused before anything is read."""

import os
import time
from dataclasses import replace

import pytest

from cluster.inbox import copy_domain, scan
from pipelines.runs.directory import RunDirectory

MARKER = "_SUCCESS"


@pytest.fixture
def inbox(tmp_path):
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def add(inbox, name: str, *paths: str, age: float = 0.0):
    folder = inbox / name
    for path in paths or ("train.jsonl", "test.jsonl"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text('{"text": "row"}\n')
    moment = time.time() - age
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (moment, moment), follow_symlinks=False)
    return folder


def only(inbox):
    (domain,) = scan(str(inbox), MARKER)
    return domain


def test_a_domain_is_complete_by_its_marker_or_after_a_rest(inbox):
    folder = add(inbox, "news")
    assert not only(inbox).is_complete(600, time.time())
    assert only(inbox).is_complete(600, time.time() + 601)
    (folder / MARKER).touch()
    assert only(inbox).is_complete(600, time.time())


def test_an_empty_folder_waits_for_files_until_its_marker_says_that_there_are_none(inbox):
    (inbox / "empty").mkdir()
    assert not only(inbox).is_complete(0, time.time() + 10**6)


def test_the_stamp_changes_with_a_file_and_not_with_the_marker(inbox):
    folder = add(inbox, "news")
    before = only(inbox).stamp
    (folder / MARKER).touch()
    assert only(inbox).stamp == before
    (folder / "test.jsonl").write_text('{"text": "more rows"}\n')
    assert only(inbox).stamp != before


def test_first_come_first_and_hidden_folders_and_loose_files_are_no_domains(inbox):
    add(inbox, "b", age=200)
    add(inbox, "a", age=100)
    add(inbox, ".trash")
    add(inbox, "_tmp")
    (inbox / "loose.jsonl").write_text("{}")
    assert [domain.name for domain in scan(str(inbox), MARKER)] == ["b", "a"]


@pytest.mark.parametrize("name", ["a b", "$(reboot)", "a.b", "naïve", "-flag", "x" * 65])
def test_unsafe_names_are_refused_and_never_become_a_path(inbox, name):
    add(inbox, name)
    domain = only(inbox)
    assert "is not a safe name" in domain.problems[0]
    assert domain.key.startswith("unsafe-")


def test_links_and_odd_paths_are_refused(inbox, tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text("{}")
    folder = add(inbox, "news", "train.jsonl", "a b.jsonl", "deep/er/still.jsonl")
    (folder / "test.jsonl").symlink_to(secret)
    (inbox / "linked").symlink_to(tmp_path)
    found = {domain.name: domain.problems for domain in scan(str(inbox), MARKER)}
    assert found["linked"] == ["is a symbolic link; put the folder itself into the inbox"]
    problems = "\n".join(found["news"])
    assert "test.jsonl is a symbolic link" in problems
    assert "'a b.jsonl' is not a safe path" in problems
    assert "still.jsonl' is not a safe path" in problems


def test_a_copy_holds_data_files_and_nothing_else(inbox, tmp_path):
    add(inbox, "news", "train/part.jsonl", "test.jsonl", "labels.json", "loader.py", "config.yaml", ".hidden")
    target = RunDirectory(str(tmp_path / "storage"))
    uri = copy_domain(str(inbox), only(inbox), MARKER, target, "data/news-1")
    files = sorted(path.relative_to(uri).as_posix() for path in (tmp_path / "storage").rglob("*") if path.is_file())
    assert files == ["_COPIED", "labels.json", "test.jsonl", "train/part.jsonl"]


def test_a_domain_that_changes_while_it_is_copied_is_not_complete(inbox, tmp_path, monkeypatch):
    folder = add(inbox, "news")
    domain = only(inbox)
    (folder / "train.jsonl").write_text("another row, written while the first was read")
    target = RunDirectory(str(tmp_path / "storage"))
    assert copy_domain(str(inbox), domain, MARKER, target, "data/news-1") is None
    assert not target.exists("data/news-1")


def test_a_link_that_takes_a_files_place_after_the_listing_is_not_followed(inbox, tmp_path):
    folder = add(inbox, "news")
    domain = only(inbox)
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").symlink_to("/etc/passwd")
    target = RunDirectory(str(tmp_path / "storage"))
    assert copy_domain(str(inbox), domain, MARKER, target, "data/news-1") is None
    assert not list((tmp_path / "storage").rglob("*.jsonl"))


def test_a_bucket_prefix_is_an_inbox_too(bucket):
    for path in ("news/train.jsonl", "news/test.jsonl", "news/_SUCCESS", "a b/train.jsonl", "loose.jsonl"):
        bucket.pipe_file(f"tasks/inbox/{path}", b'{"text": "row"}\n')
    inbox = "s3://tasks/inbox"
    found = {domain.name: domain for domain in scan(inbox, MARKER)}
    assert "not a safe name" in found.pop("a b").problems[0]
    news = found.pop("news")
    assert not found
    assert news.marked
    assert [file.path for file in news.files] == ["test.jsonl", "train.jsonl"]
    assert not replace(news, marked=False).is_complete(600, time.time())
    assert replace(news, marked=False).is_complete(600, time.time() + 700)
    target = RunDirectory("s3://tasks/storage")
    assert copy_domain(inbox, news, MARKER, target, "data/news-1") == "s3://tasks/storage/data/news-1"
    assert target.list("data/news-1") == ["_COPIED", "test.jsonl", "train.jsonl"]
    bucket.pipe_file("tasks/inbox/news/train.jsonl", b'{"text": "ROW"}\n')  # of the same size
    (changed,) = [domain for domain in scan(inbox, MARKER) if domain.name == "news"]
    assert changed.stamp != news.stamp
