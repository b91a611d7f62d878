"""Structure-aware fuzzing: valid documents, damaged where they have meaning, and then as text.

An input is a valid document with a few edits (a value replaced by a hostile one, a key misspelt, a part removed or
wrapped) and, for files, a few edits of its bytes (cut off, overwritten, repeated). The rule that all targets share:
every input gives a result or one of our own errors in one line, in bounded time.
"""

from __future__ import annotations

import copy
import json
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

LONG = int(os.environ.get("CURLORA_FUZZ", "0"))  # examples per target; 0: the short form of `make test`
SLOW = 60.0  # seconds after which an input counts as a hang
DEEP: Any = "x"
for _ in range(200):
    DEEP = [DEEP]
HOSTILE = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 10**18, 2**63, 2**64, 10**400, 1e308, float("inf"), float("nan")),
    *(
        "",
        " ",
        "x",
        "\0",
        "a" * 5000,
        "\ud800",
        "ß",
        "İ",
        "e\u0301",
        "\u202e",
        "💥",
        "<script>alert(1)</script>",
        "</script>",
    ),
    *(
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "-rf",
        "--help",
        "%s%n",
        "a b",
        "a/b",
        ".",
        "~",
        "~nobody/x",
    ),
    *(
        "$HOME",
        "${NOPE}",
        "{",
        "}",
        "{}",
        "{0}",
        "{text.__class__}",
        "{text!r:>9999999}",
        "{text:>99999999}",
        "{text[0]}",
    ),
    *(
        "s3://bucket/x",
        "file:///etc/passwd",
        "nope://x",
        "zip://a::file://b",
        "models:/x@y",
        "http://[::1",
        "x@y",
        "@",
    ),
    *(
        "true",
        "null",
        "nan",
        "1e5",
        "0x10",
        "2026-13-45",
        "train@x",
        "train[:",
        "train[1:2]+test",
        "(",
        "[",
        "*",
        "(?P<",
    ),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": 1}}, ["x"] * 300, {str(n): n for n in range(300)}, DEEP),
)
NAMES = ("", " ", "x", "model", "__class__", "a.b", "\0", "ß", "path", "name", "-x", "0", "\ud800", "k" * 3000)

Edit = tuple[int, str, Any, str]
EDITS = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.sampled_from(("replace", "replace", "replace", "remove", "rename", "wrap", "copy", "scale")),
        st.one_of(st.sampled_from(HOSTILE), st.integers(), st.floats(), st.text(max_size=12)),
        st.sampled_from(NAMES),
    ),
    max_size=4,
)
CUTS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(("cut", "insert", "overwrite", "repeat", "remove")),
        st.one_of(
            st.binary(max_size=8),
            st.sampled_from((b"{", b"}", b"[" * 300, b'"', b"\n", b"\xff\xfe", b"\0" * 16, b",", b"\xed\xa0\x80")),
        ),
    ),
    max_size=2,
)


def _nodes(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values of a document, its root first."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _nodes(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(min(len(value), 50)):
            yield from _nodes(value[number], (*path, number))


def edited(document: Any, edits: Collection[Edit]) -> Any:
    """A copy of a document of dicts, lists and scalars with these edits."""
    root = [copy.deepcopy(document)]
    for number, operation, value, name in edits:
        paths = list(_nodes(root[0], (0,)))
        *above, last = paths[number % len(paths)]
        place: Any = root
        for key in above:
            place = place[key]
        old = place[last]
        if operation == "replace":
            place[last] = copy.deepcopy(value)
        elif operation == "remove" and above:
            del place[last]
        elif operation == "rename" and isinstance(place, dict):
            place[name] = place.pop(last)
        elif operation == "wrap":
            place[last] = [old, old] if number % 2 else {name: old}
        elif operation == "copy" and isinstance(place, list) and above:
            place.append(copy.deepcopy(old))
        elif operation == "scale" and isinstance(old, int | float) and not isinstance(old, bool):
            place[last] = old * 10 ** (number % 40) if number % 2 else -old
    return root[0]


def damaged(content: bytes, cuts: Collection[tuple[float, str, bytes]]) -> bytes:
    """A file's content with these edits of its bytes."""
    for where, operation, extra in cuts:
        at = int(where * len(content))
        if operation == "cut":
            content = content[:at]
        elif operation == "insert":
            content = content[:at] + extra + content[at:]
        elif operation == "overwrite":
            content = content[:at] + extra + content[at + len(extra) :]
        elif operation == "repeat":
            content = content[:at] + content[at // 2 : at] + content[at:]
        else:
            content = content[:at] + content[at + 1 + len(extra) :]
    return content


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def one_line(error: BaseException) -> None:
    """Every problem of an error is one line that says something, in printable characters."""
    problems = getattr(error, "problems", None)
    lines = [str(problem) for problem in problems] if problems else [str(error)]
    for line in lines:
        assert line.strip() and "\n" not in line and "Traceback" not in line, repr(line)
        assert len(line) <= 3000, f"{len(line)} characters: {line[:200]}"
        line.encode()  # what a terminal can show


def fuzz(check: Callable, *inputs: st.SearchStrategy, examples: int, share: float = 1.0) -> None:
    """Run `check` on many inputs, and fail with every kind of error that it raised and the first input of each.

    Args:
        examples: number of inputs of the short form.
        share: of `CURLORA_FUZZ` that this target runs, less for slow ones.
    """
    findings: dict[tuple, str] = {}
    tried, begun = 0, time.monotonic()

    @settings(
        max_examples=max(examples, int(LONG * share)),
        deadline=None,
        database=None,
        derandomize=not LONG,  # the short form is the same every time
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*inputs))
    def run(drawn) -> None:
        nonlocal tried
        tried += 1
        before = time.monotonic()
        try:
            check(*copy.deepcopy(drawn))
            assert time.monotonic() - before < SLOW, f"took {time.monotonic() - before:.0f} s"
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "pipelines" in frame.filename or "cluster" in frame.filename] or frames
            where = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}"
            told = f"{type(error).__name__} at {where}: {str(error)[:300]}\n    {str(drawn)[:1500]}"
            findings.setdefault((type(error), where), told)

    run()
    if LONG:
        print(f"\n{tried:,} inputs in {(time.monotonic() - begun) / 60:.1f} minutes, {len(findings)} findings")
    assert not findings, f"{len(findings)} findings\n" + "\n".join(findings.values())
