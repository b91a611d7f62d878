"""The page, the figures and the terminal's summary of realistic runs."""

from __future__ import annotations

import io
import math
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console
from sample_run import make_run

from pipelines.reporting.drawing import colors
from pipelines.reporting.formatting import duration, signed, size
from pipelines.reporting.page import ReportError, write_figures, write_report
from pipelines.reporting.summary import goodness, headlines, histories, print_summary, story
from pipelines.runs.results import Results

SHAPES = {
    "mixed": {"tasks": ("mrpc", "sst2", "biomed")},
    "classification only": {"tasks": ("mrpc", "sst2"), "retention": ()},
    "text only": {"tasks": ("biomed", "code", "finance"), "retention": ("wikitext2", "books")},
    "single": {"tasks": ("mrpc",)},
    "joint": {"tasks": ("mrpc", "biomed"), "strategy": {"name": "joint"}},
}


class Page(HTMLParser):
    """Just enough of a browser: tags that are balanced, what they load, tables and text."""

    VOID = frozenset({"meta", "link", "br", "img", "hr"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run of all three kinds of numbers, with its page."""
    run = make_run(tmp_path_factory.mktemp("mixed"))
    return run, page_of(run)


def page_of(run) -> Page:
    path = write_report(run)
    page = Page(run.read_bytes(path).decode())
    assert page.open == []
    return page


def printed(results: Results, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(results, console)
    return console.file.getvalue()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_run_has_page_figures_and_summary(shape, tmp_path):
    run = make_run(tmp_path, **SHAPES[shape])
    results = run.results()
    written = write_figures(run)
    expected = {"score_matrix", "tasks", "training"} | ({"perplexity"} if results.nll else set())
    assert written == [
        f"figures/{name}.png" for name in ("score_matrix", "perplexity", "tasks", "training") if name in expected
    ]
    for path in written:
        data = run.read_bytes(path)
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 600 and height >= 200
    page = page_of(run)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(expected)  # the matrix is a table on the page, the ancestry is drawn
    assert all(len(image["alt"]) > 20 for image in images)
    assert not re.search(r"\b(None|nan|inf)\b", page.text.split("Configuration")[0])
    for task in results.tasks:
        assert task in printed(results)


def test_page_loads_nothing_from_anywhere(mixed):
    run, page = mixed
    loaded = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset", "action") if name in attrs]
    assert loaded and all(value.startswith("data:") for value in loaded)
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\(", run.read_bytes("report.html").decode())


def test_page_is_made_for_phone_and_print(mixed):
    run, page = mixed
    text = run.read_bytes("report.html").decode()
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "@media print" in text
    # whatever is wide sits in something that scrolls
    assert len(re.findall(r"<table", text)) == len(re.findall(r'<div class="scroll"><table', text)) > 3


def test_text_from_configuration_and_data_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    run = make_run(tmp_path, tasks=("mrpc", "sst2"), base_model={"path": str(tmp_path / evil), "dtype": "float32"})
    results = run.results()
    # names have a safe alphabet in a configuration, but the page must not rely on it
    results = replace(
        results,
        tasks=(evil, "sst2"),
        metric={evil: results.metric["mrpc"], "sst2": results.metric["sst2"]},
        majority={evil: results.majority["mrpc"], "sst2": results.majority["sst2"]},
        steps=(replace(results.steps[0], task=evil), results.steps[1]),
        gate={"passed": False, "reasons": [evil]},
    )
    run.write_json("results.json", results)
    page = page_of(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 5  # still readable as text
    assert evil in printed(results)


def renamed(value, names: dict[str, str]):
    """A record with other names, as keys and as values."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def test_no_text_can_leave_its_element_or_attribute(tmp_path):
    """Names are safe in a configuration; a page of records from elsewhere must not rely on it."""
    evil = "<script>alert(1)</script>\"'"
    run = make_run(tmp_path, evaluation={"samples": SAMPLES})
    names = dict.fromkeys(("mrpc", "accuracy", "sequential", "curlora", "cpu", "Who are you?"), evil)
    names |= dict.fromkeys(("good", "bad", *(f"answer 0 after {k}" for k in range(4))), evil)
    for directory in run.finished_steps().values():
        run.write_json(f"{directory}/metrics.json", renamed(run.metrics(directory).to_json(), names))
    results = renamed(run.results().to_json(), names)
    extras = [None, *({evil: 0.5} for _ in results["steps"])]
    compared = {"name": evil, "metric": evil, "champion": 0.9, "candidate": 0.7, "loss": 0.2, "limit": 0.1, "p": 0.01}
    results |= {
        "run": evil,
        "status": evil,
        "base_model": evil,
        "extras": {evil: extras},
        "registry": {"uri": evil, "promoted": False, "hook_failure": evil},
        "gate": {
            "passed": False,
            "reasons": [evil],
            "notes": [evil],
            "against": {"name": evil, "version": 1},
            "comparisons": [compared | {"refused": True}],
        },
    }
    run.write_json("results.json", results)
    run.write_bytes("config.yaml", f"# {evil}\n".encode() + run.read_bytes("config.yaml"))
    page = page_of(run)
    assert "<script" not in run.read_bytes("report.html").decode()
    assert page.text.count(evil) >= 30
    known = {"alt", "aria-label", "charset", "class", "content", "href", "lang", "name", "open", "rel", "scope", "src"}
    assert {name for _, attrs in page.tags for name in attrs} <= known | {"style"}
    assert sum(evil in attrs.get("alt", "") for _, attrs in page.tags) >= 3
    assert ("span", {"class": f"status {evil}"}) in page.tags


SAMPLES = {"prompts": ["Who are you?"], "per_task": 1}


def test_answers_stand_side_by_side_only_where_there_are_any(mixed, tmp_path):
    assert "What it says" not in mixed[1].text
    run = make_run(tmp_path, evaluation={"samples": SAMPLES})
    page = page_of(run)
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == "prompt")
    columns = ["base", "1 mrpc", "2 sst2", "3 biomed"]
    assert page.rows[start] == ["prompt", *columns, "reference"]
    general, mrpc, _, biomed = page.rows[start + 1 : start + 5]
    assert general == ["Who are you?", *(f"answer 0 after {k}writes:(nothing)" for k in range(4)), "–"]
    question = next(s for s in run.metrics("steps/" + run.list("steps")[0]).samples if s.task == "mrpc")
    assert mrpc[0] == f"mrpc{question.prompt}"
    assert mrpc[-1] == question.reference
    assert biomed[4].startswith("answer 3 after 3")
    own = [i for i, (tag, attrs) in enumerate(page.tags) if tag == "td" and attrs.get("class", "").startswith("own ")]
    assert len(own) == 3


def test_a_right_answer_and_one_that_did_not_change_are_marked(tmp_path):
    run = make_run(tmp_path, tasks=("mrpc", "sst2"), evaluation={"samples": {"per_task": 2}})
    page = page_of(run)
    right, wrong = next(page.rows[i + 1 : i + 3] for i, row in enumerate(page.rows) if row and row[0] == "prompt")
    assert all(cell.startswith("✓ ") for cell in right[1:4])
    assert not any(cell.startswith("✓ ") for cell in wrong[1:4])
    marks = [attrs["class"] for tag, attrs in page.tags if tag == "td" and "class" in attrs]
    assert marks.count("same") + marks.count("own same") == 2  # after the base, the right answer stays what it is


def test_answers_to_questions_of_an_earlier_configuration_are_not_shown(tmp_path):
    run = make_run(tmp_path, evaluation={"samples": SAMPLES})
    results = run.results()
    run.write_json("results.json", replace(results, samples=results.samples[:1]))
    assert sum("answer" in cell for row in page_of(run).rows for cell in row) == 4
    run.write_json("results.json", replace(results, samples=None))
    assert "What it says" not in page_of(run).text


def test_matrix_table_is_the_score_matrix(mixed):
    _, page = mixed
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == "after")
    assert [cell.split("accuracy")[0].split("nll")[0] for cell in page.rows[start][1:]] == ["mrpc", "sst2", "biomed"]
    assert page.rows[start + 1 : start + 5] == [
        ["base", "0.500", "0.511", "4.874"],
        ["1 mrpc", "0.830", "0.511", "–"],
        ["2 sst2", "0.785", "0.800", "4.874"],
        ["3 biomed", "0.740", "0.755", "4.074"],
    ]
    own = [tag for tag, attrs in page.tags if attrs.get("class") == "own"]
    assert len(own) == 3


def test_ancestry_names_every_fingerprint_and_data_digest(mixed):
    run, page = mixed
    text = page.text
    for fingerprint, directory in run.finished_steps().items():
        assert fingerprint in text
        for data in (run.metrics(directory).data or {}).values():
            assert data.train.digest in text


def test_change_is_negative_for_forgetting_in_either_direction(tmp_path):
    run = make_run(tmp_path, tasks=("mrpc", "biomed", "sst2"))
    by_name = {row.name: row for row in histories(run.results())}
    assert by_name["mrpc"].change == pytest.approx(-0.09)
    assert by_name["biomed"].change == pytest.approx(-0.11)  # its NLL rose
    assert by_name["sst2"].change is None  # trained last
    assert (by_name["biomed"].best, by_name["biomed"].final) == pytest.approx((4.087, 4.197))


def test_joint_has_no_change_and_both_tasks_learned_in_one_row(tmp_path):
    rows = histories(make_run(tmp_path, tasks=("mrpc", "biomed"), strategy={"name": "joint"}).results())
    assert [row.change for row in rows] == [None, None]
    assert all(row.learned == row.final is not None for row in rows)


def test_brightness_follows_each_metrics_own_direction():
    assert goodness([0.5, None, 0.8], "accuracy") == [0.5, None, 0.8]
    shades = goodness([4.9, 4.1, None, 4.2], "nll")
    assert shades[1] == 1.0 and shades[2] is None
    assert shades[0] < shades[3] < 1.0
    assert goodness([None, None], "nll") == [None, None]


def test_numbers_in_the_heat_map_keep_their_contrast():
    """WCAG AA: at least 4.5 : 1 on every shade."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for background, ink in colors([k / 50 for k in range(51)]):
        high, low = sorted((luminance(background), luminance(ink)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_headlines_are_those_the_run_has(tmp_path):
    mixed = {item.label: item.value for item in headlines(make_run(tmp_path).results())}
    assert mixed["average accuracy"] == "0.747"
    assert mixed["backward transfer"] == "−0.068"
    assert mixed["NLL backward transfer"] == "–"
    assert mixed["perplexity ratio"] == "1.037"
    assert mixed["trainable parameters"] == "2,304"
    text_only = {item.label for item in headlines(make_run(tmp_path, tasks=("biomed",), retention=()).results())}
    assert not {"average accuracy", "perplexity ratio"} & text_only


def test_story_says_what_was_lost(tmp_path):
    text = story(make_run(tmp_path).results())
    assert "the earlier tasks had lost 0.068 points of score" in text
    assert "rose by 3.7\u00a0%" in text
    assert "trained together" in story(make_run(tmp_path, strategy={"name": "joint"}).results())


def test_terminal_shows_matrix_headlines_and_fits(tmp_path):
    text = printed(make_run(tmp_path).results(), width=80)
    for expected in ("base", "3 biomed", "0.830", "learning accuracy", "backward transfer", "9.6 kB", "2,304", "time"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80


def test_long_sequence_stays_readable_in_terminal_and_page(tmp_path):
    run = make_run(tmp_path, tasks=[f"task{k}" for k in range(14)])
    text = printed(run.results(), width=80)
    assert "task13" in text and "…" not in text
    assert write_figures(run)
    assert "The last 12 of 14 steps" in page_of(run).text


def test_half_done_run_has_a_page(tmp_path):
    run = make_run(tmp_path, finished=1, status="failed")
    assert run.results().scores[2:] == [[None] * 3] * 2
    assert "1 of 3 steps are done so far" in page_of(run).text
    assert len(write_figures(run)) == 4


def test_run_without_results_says_so(tmp_path):
    run = make_run(tmp_path, finished=0, status=None)
    with pytest.raises(ReportError, match="no results yet"):
        write_report(run)


def test_writing_again_gives_the_same_bytes(mixed):
    run, _ = mixed
    first = run.read_bytes("report.html")
    assert run.read_bytes(write_report(run)) == first


def test_numbers_for_people():
    assert [signed(value) for value in (0.1, -0.1, -0.0001, None)] == ["+0.100", "−0.100", "0.000", "–"]
    assert [size(value) for value in (9, 9216, 1.4e9, None)] == ["9 B", "9.2 kB", "1.4 GB", "–"]
    assert [duration(value) for value in (3.25, 95, 7384, None)] == ["3.2 s", "1 min 35 s", "2 h 03 min", "–"]
    assert math.isclose(goodness([1.0, 2.0], "nll")[1], math.exp(-1))


def test_written_answers_are_shown_in_every_metric(tmp_path):
    run = make_run(tmp_path)
    results = run.results()
    name = results.tasks[0]
    rows = [{"rouge_l": 0.125 * k, "exact_match": 0.0625 * k} if k else None for k in range(len(results.scores))]
    metric = results.metric | {name: "rouge_l"}
    run.write_json("results.json", replace(results, extras={name: rows}, metric=metric))
    write_report(run)
    page = run.read_bytes("report.html").decode()
    assert "<h2>Generated answers</h2>" in page
    assert "rouge_l, the task&#x27;s metric" in page or "rouge_l, the task's metric" in page
    assert "<td>0.375</td>" in page
    assert "<td>0.188</td>" in page
