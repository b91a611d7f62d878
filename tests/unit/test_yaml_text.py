"""Configurations that are hostile or only mistaken: one clear line each, in bounded time."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config.loading import load_config, read_config
from pipelines.config.yaml_text import CHARACTERS, LEVELS, YamlError, read_text
from pipelines.errors import ConfigError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
HOSTILE = {
    "alias bomb": (BOMB, "line 5: stands for more than 100,000 values"),
    "self-reference": ("a: &a [1, *a]\n", "line 1: an anchor contains itself"),
    "self-reference in a mapping": ("a: &a\n  b:\n    c: *a\n", "an anchor contains itself"),
    "deep lists": ("a: " + "[" * 3000 + "]" * 3000, f"line 1: more than {LEVELS} levels"),
    "deep mappings": ("{a: " * 3000 + "1" + "}" * 3000, f"more than {LEVELS} levels"),
    "impossible date": ("a: 2026-13-45", "month must be in 1..12"),
    "long integer": (f"a: {'9' * 5000}", "a value cannot be read"),
    "no binary digits": ("a: 0b_", "a value cannot be read"),
    "key twice": ("a: 1\nb: 2\na: 3\n", "line 3: 'a' is given twice, first on line 1; remove one"),
    "key twice below": (
        "training:\n  learning_rate: 1\n  learning_rate: 2\n",
        "line 3: 'learning_rate' is given twice, first on line 2",
    ),
    "key twice in flow": ("training: {learning_rate: 1, learning_rate: 2}", "'learning_rate' is given twice"),
    "list as a key": ("? [a, b]\n: 1\n", "line 1: a key is sequence; write a name"),
    "too long": ("a: " + "x" * CHARACTERS, "has 1,000,003 characters"),
    "control character": ("a: \x00", "not valid YAML"),
    "unknown tag": ("a: !!python/object/apply:os.system [ls]", "not valid YAML: could not determine a constructor"),
    "unknown anchor": ("a: *b", "found undefined alias"),
    "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML: expected a single document"),
    "unclosed": ("a: [1", "not valid YAML"),
}


@pytest.mark.parametrize(("text", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_what_the_loader_would_take_or_break_on_is_one_clear_line(text, expected):
    with pytest.raises(YamlError) as error:
        read_text(text)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_and_an_override_say_the_same(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    (problem,) = error.value.problems
    assert problem.field == str(file) and expected in problem.message
    file.write_text("name: x\n")
    with pytest.raises(ConfigError) as error:
        read_config(file, [f"training={text}"])
    (problem,) = error.value.problems
    assert problem.field == "--set" and expected in problem.message


def test_aliases_and_merged_mappings_stay_what_they_are():
    text = "base: &base {a: 1, b: 2}\nown: {<<: *base, b: 3}\nagain: *base\n"
    assert read_text(text) == {"base": {"a": 1, "b": 2}, "own": {"a": 1, "b": 3}, "again": {"a": 1, "b": 2}}


@pytest.mark.parametrize(("text", "value"), [("3e-3", 0.003), ("1_000", 1000), ("yes", True), ("", None), ("x", "x")])
def test_scalars(text, value):
    assert read_text(text) == value


TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_whatever_is_written_is_read_as_it_was(tree):
    import yaml

    found = read_text(yaml.safe_dump(tree))
    assert found == tree or (isinstance(tree, float) and math.isinf(tree) and math.isinf(found))


@settings(max_examples=150, deadline=None)
@given(st.text("abc:-[]{},&*!|>#'\"?\n 019.eE_~%@`", max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        read_text(text)
    except YamlError as error:
        assert "\n" not in str(error)
