"""What is refused before any worker starts: every problem at once, with file, line and remedy, and never a crash."""

import importlib.util
import json
import os
import string

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pipelines.config.loading import parse_config
from pipelines.preflight.data import check_data
from tests.conftest import minimal, write_jsonl

GOOD = [{"text": f"the film is {word}", "label": i % 2} for i, word in enumerate(("good", "bad", "warm", "dull"))]
TESTED = [{"text": "a bright story", "label": 0}, {"text": "a slow joke", "label": 1}]


@pytest.fixture
def check(tmp_path, model, tokenizer):
    """(problems, warnings) of one task; files are written into `check.folder`."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", GOOD)
    write_jsonl(folder / "test.jsonl", TESTED)

    def check(max_length: int = 60, **task) -> tuple[str, str]:
        raw = minimal(tmp_path, folder, base_model={"path": str(tmp_path / "base")})
        raw["training"] = {"max_length": max_length}
        raw["tasks"] = [{"name": "task", "kind": "classification", "data": str(folder)} | task]
        warnings: list[str] = []
        problems = check_data(parse_config(raw), warnings.append)
        return "\n".join(map(str, problems)), "\n".join(warnings)

    check.folder = folder
    return check


def test_good_data_passes_without_a_word(check):
    assert check() == ("", "")


def test_all_problems_come_at_once(check):
    write_jsonl(check.folder / "train.jsonl", [*GOOD, {"text": "", "label": 0}, {"text": "a plot", "label": None}])
    write_jsonl(check.folder / "test.jsonl", [TESTED[0], {"text": None, "label": 1}])
    problems, _ = check()
    assert f"{check.folder}/train.jsonl:5: 'text' is empty text; fill it or drop the row" in problems
    assert f"{check.folder}/train.jsonl:6: the label 'label' is missing; fill it or drop the row" in problems
    assert f"{check.folder}/test.jsonl:2: 'text' is missing" in problems


def test_lines_are_those_of_the_file_also_with_blank_ones_between(check):
    rows = [json.dumps(row) for row in (*GOOD, {"text": " ", "label": 0})]
    (check.folder / "train.jsonl").write_text("\n\n".join(rows) + "\n")
    assert "train.jsonl:9: 'text' is empty text" in check()[0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": i, "label": i % 2} for i in range(4)], "train.jsonl:1: 'text' is a int (0), expected text"),
        ([{"text": ["a"], "label": 0}, {"text": ["b"], "label": 1}], "'text' is a list (['a']), expected text"),
        ([{"words": "a", "label": 0}], "task/train has no column 'text', expected one of: label, words"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 0}], "all 2 rows have the same label '0'"),
        ([*GOOD, {"text": "a plot", "label": float("nan")}], "the label 'label' is NaN"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "test.jsonl:1: label 0 is outside the label set"),
    ],
)
def test_wrong_columns_types_and_labels(check, rows, expected):
    write_jsonl(check.folder / "train.jsonl", rows)
    assert expected in check()[0]


def test_a_label_that_train_lacks_is_found(check):
    write_jsonl(check.folder / "test.jsonl", [*TESTED, {"text": "x", "label": 2}])
    assert "the label(s) 'c' never occur in train" in check(labels=["a", "b", "c"])[0]


def test_one_class_in_test_is_a_warning(check):
    write_jsonl(check.folder / "test.jsonl", [row | {"label": 1} for row in TESTED])
    problems, warnings = check()
    assert problems == ""
    assert "task/test: all 2 rows have the same label '1'; scores on it mean little" in warnings


def test_rows_with_one_kind_of_problem_are_one_line_with_their_number(check):
    strange = [{"text": "a film", "label": 7 + number % 3} for number in range(12)]
    write_jsonl(check.folder / "train.jsonl", [*GOOD, *[{"text": None, "label": 0}] * 50, *strange])
    problems, _ = check(labels=["bad", "good"])
    first, second = problems.splitlines()
    begin = len(GOOD) + 1
    assert f"train.jsonl:{begin}: 'text' is missing" in first
    assert first.endswith(f"(also rows {begin + 1}, {begin + 2}, {begin + 3}, {begin + 4} and 45 more)")
    assert f"train.jsonl:{begin + 50}: label 7 is outside the label set" in second
    assert second.endswith(" and 7 more)")


def test_two_rows_with_one_kind_of_problem_are_both_named(check):
    write_jsonl(check.folder / "train.jsonl", [*GOOD, *[{"text": None, "label": 0}] * 2])
    problems, _ = check()
    assert problems.endswith(f"(also row {len(GOOD) + 2})")


def test_overlap_is_a_warning_with_its_count(check):
    copied = {"text": "the  film is good", "label": 0}  # spaces do not hide it
    write_jsonl(check.folder / "test.jsonl", [*TESTED, copied, copied])
    problems, warnings = check()
    assert problems == ""
    assert warnings.startswith("task: 2 of 4 test texts also occur in train")


def test_broken_encoding_names_file_line_and_byte(check):
    for name, line in (("train.jsonl", b'{"text": "caf\xe9", "label": 0}\n'), ("train.csv", b"caf\xe9,1\n")):
        (check.folder / "train.jsonl").unlink(missing_ok=True)
        head = b"text,label\n" if name.endswith("csv") else b""
        (check.folder / name).write_bytes(head + line * 2)
        problems, _ = check()
        assert f"{check.folder}/{name}:{2 if head else 1}: " in problems
        assert "UTF-8" in problems


DEEP = 100_000
KILLERS = {
    "only null": ("null\n" * 50, "train.jsonl:1: expected an object, found NoneType"),
    "a null among rows": ('{"text": "a", "label": 0}\nnull\n', "train.jsonl:2: expected an object, found NoneType"),
    "only numbers": ("1\n" * 50, "train.jsonl:1: expected an object, found int"),
    "deep list": ('{"text": ' + "[" * DEEP + "]" * DEEP + ', "label": 0}\n', "train.jsonl:1: nested more than 64"),
    "deep object": ('{"text": ' * DEEP + "1" + "}" * DEEP + "\n", "train.jsonl:1: nested more than 64"),
    "less deep": ('{"text": ' + "[" * 2000 + "]" * 2000 + ', "label": 0}\n', "train.jsonl:1: nested more than 64"),
    "deep and broken": ("{" + "[" * DEEP + "\n", "train.jsonl:1: nested more than 64"),
}


@pytest.mark.parametrize(("content", "expected"), KILLERS.values(), ids=KILLERS)
def test_what_would_kill_the_reader_is_found_before_it_reads(check, content, expected):
    (check.folder / "train.jsonl").write_text(content)
    problems, _ = check()
    assert expected in problems


def test_brackets_in_a_text_are_no_nesting(check):
    rows = [row | {"text": "[{" * 200 + '\\"' + row["text"]} for row in GOOD]
    write_jsonl(check.folder / "train.jsonl", rows)
    assert check()[0] == ""


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_truncated_files(check, form):
    (check.folder / "train.jsonl").unlink()
    file = check.folder / f"train.{form}"
    if form == "jsonl":
        write_jsonl(file, GOOD)
    elif form == "csv":
        file.write_text("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in GOOD))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(GOOD), file)
    assert check()[0] == ""
    content = file.read_bytes()
    file.write_bytes(content[: -len(content) // 3] if form == "parquet" else content[:-5])
    problems, _ = check()
    where = {"jsonl": "train.jsonl:4", "csv": "train.csv:5", "parquet": "train.parquet"}[form]
    assert f"{check.folder}/{where}" in problems


def test_text_that_vanishes_and_answers_that_leave_no_room(check):
    problems, _ = check(
        head="verbalizer", prompt="{text}:", verbalizer=["good", "warm and bright and good"], max_length=8
    )
    assert "nothing of the prompt would be left; raise max_length" in problems
    assert "has no tokens" in check(head="verbalizer", prompt="{text}:", verbalizer=["good", ""])[0]
    assert "verbalizer has 1 texts for 2 labels" in check(head="verbalizer", prompt="{text}:", verbalizer=["x"])[0]


def test_generation_needs_room_to_write(check):
    task = {"kind": "generation", "prompt": "{text}", "completion": "{label}", "max_new_tokens": 64}
    assert "tasks.0.max_new_tokens: 64 leaves no room in the model's context of 64 tokens" in check(**task)[0]


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat(("user", "a"), ("user", "b")), "ends with message 2 of the role 'user'"),
        (chat(("user", "a"), ("bot", "b")), "message 2 has the role 'bot', use one of: system, user"),
        (chat(("user", "a"), ("assistant", " ")), "'messages, message 2' is empty text"),
        (chat(("user", "a")), "expected at least two that end with the assistant's answer"),
        ({"messages": []}, "'messages' is [], expected a list of {role, content}"),
    ],
)
def test_chats_that_cannot_be_learned_from(check, row, expected):
    write_jsonl(check.folder / "train.jsonl", [chat(("user", "a"), ("assistant", "b")), row])
    write_jsonl(check.folder / "test.jsonl", [chat(("user", "c"), ("assistant", "d"))])
    problems, _ = check(kind="generation", messages="messages")
    assert f"{check.folder}/train.jsonl:2" in problems
    assert expected in problems
    assert "needs a chat template" not in problems  # found once the rows are whole
    write_jsonl(check.folder / "train.jsonl", [chat(("user", "a"), ("assistant", "b"))])
    assert "messages needs a chat template, the tokenizer has none" in check(kind="generation", messages="messages")[0]


def test_choices_and_their_label(check):
    rows = [{"text": "a", "choices": ["x", "y"], "label": 2}, {"text": "b", "choices": ["x"], "label": 0}]
    write_jsonl(check.folder / "train.jsonl", rows)
    write_jsonl(check.folder / "test.jsonl", rows)
    problems, _ = check(kind="multiple-choice", prompt="{text}", choices="choices")
    assert "train.jsonl:1: label 2 is outside the choices" in problems
    assert "train.jsonl:2: 'choices' is ['x'], expected a list of at least two texts" in problems


@pytest.mark.parametrize("template", ["{text.__class__}", "{0}", "{text!r}", "{text", "text}", "{}"])
def test_templates_hold_plain_names_only(check, template):
    from pipelines.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        check(head="verbalizer", prompt=template)
    assert "brace" in str(error.value)


# -- what max_length cuts off


TOO_LONG = [{"text": f"{'a film is good ' * n}", "label": i % 2} for i, n in enumerate((1, 2, 8, 1))]


@pytest.mark.parametrize(
    ("task", "lost"),
    [
        ({}, "ends"),
        (
            {"head": "verbalizer", "prompt": "{text}:", "verbalizer": ["bad", "good"]},
            "the beginnings of their prompts",
        ),
        ({"kind": "generation", "prompt": "{text}", "completion": "{label}", "max_new_tokens": 4}, "the beginnings"),
        ({"kind": "multiple-choice", "prompt": "{text}", "choices": ["{label} a", "b c"]}, "the beginnings"),
    ],
)
def test_what_max_length_cuts_off_is_counted_and_named(check, task, lost):
    write_jsonl(check.folder / "train.jsonl", TOO_LONG)
    problems, warnings = check(max_length=24, **task)
    assert problems == ""
    (line,) = [line for line in warnings.splitlines() if "more than" in line]
    assert line.startswith(f"task/train: 1 of 4 rows have more than 24 tokens and lose {lost}")
    assert "the longest, row 3, has " in line and line.endswith("raise training.max_length or shorten them")
    assert "more than" not in check(max_length=60, **task)[1]


def test_cuts_of_the_test_split_by_the_context_have_another_remedy(check):
    task = {"kind": "generation", "prompt": "{text}", "completion": "{label}", "max_new_tokens": 50}
    write_jsonl(check.folder / "test.jsonl", TOO_LONG)
    (line,) = [line for line in check(max_length=60, **task)[1].splitlines() if "more than" in line]
    assert line.startswith("task/test: 1 of 4 rows have more than 14 tokens")
    assert line.endswith("the base's context holds no more or shorten them")


def test_text_in_windows_loses_nothing(check):
    write_jsonl(check.folder / "train.jsonl", TOO_LONG)
    assert "more than" not in check(max_length=24, kind="language-modeling")[1]


# -- properties: whatever comes, a clear word or a clean pass


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
CELL = st.text(string.printable, max_size=8) | st.integers(-2, 3) | st.none() | ANYTHING
KINDS = st.sampled_from(
    [
        {},
        {"head": "verbalizer", "prompt": "{text}:"},
        {"kind": "language-modeling"},
        {"kind": "generation", "prompt": "{text}", "completion": "{label}", "max_new_tokens": 4},
        {"kind": "generation", "messages": "text"},
        {"kind": "multiple-choice", "prompt": "{label}", "choices": "text"},
    ]
)
PROPERTY = settings(
    max_examples=int(os.environ.get("CURLORA_TEST_EXAMPLES", "25")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def passes_or_says_why(check, **task) -> None:
    """No crash; what passes can be encoded for training and for scoring."""
    from pipelines.data.sets import evaluation_set, training_examples

    problems, _ = check(**task)
    if problems:
        assert all(len(line) > 20 for line in problems.splitlines())
        return
    raw = {"name": "x", "base_model": {"path": str(check.folder.parent / "base")}}
    raw["tasks"] = [{"name": "task", "kind": "classification", "data": str(check.folder)} | task]
    config = parse_config(raw)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(config.base_model.path)
    training_examples(config.tasks[0], tokenizer, 60, None, 0)
    evaluation_set(config.tasks[0], tokenizer, config, 64)


@PROPERTY
@given(rows=st.lists(st.fixed_dictionaries({}, optional={"text": CELL, "label": CELL}), max_size=4), task=KINDS)
def test_any_rows_pass_or_are_explained(check, rows, task):
    write_jsonl(check.folder / "train.jsonl", rows)
    write_jsonl(check.folder / "test.jsonl", rows[:2])
    passes_or_says_why(check, **task)


@PROPERTY
@given(content=st.binary(max_size=60), form=st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "txt"]))
def test_any_bytes_pass_or_are_explained(check, content, form):
    for file in check.folder.glob("train.*"):
        file.unlink()
    (check.folder / f"train.{form}").write_bytes(content)
    passes_or_says_why(check)


@PROPERTY
@given(data=st.data(), form=st.sampled_from(["jsonl", "csv", "parquet"]))
def test_any_damage_to_a_good_file_passes_or_is_explained(check, data, form):
    for file in check.folder.glob("train.*"):
        file.unlink()
    file = check.folder / f"train.{form}"
    if form == "jsonl":
        write_jsonl(file, GOOD)
    elif form == "csv":
        file.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in GOOD))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(GOOD), file)
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["cut", "flip", "insert"]))
    if how == "cut":
        del content[at:]
    elif how == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    file.write_bytes(bytes(content))
    passes_or_says_why(check)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_benchmark_without_its_suite_is_refused_before_a_run(tmp_path, reviews):
    bench = {"name": "bench", "suite": "lm-eval", "tasks": ["arc_easy"]}
    (problem,) = check_data(parse_config(minimal(tmp_path, reviews, retention=[bench])))
    assert str(problem).startswith("retention.0.suite: lm-eval is not installed; pip install 'curlora[lm-eval]'")
