"""From docstrings to plain English prose."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator

MIN_WORDS = 8  # of a docstring's prose
# headings of tables, whose lines are no prose
TABLES = (
    "parameters|other parameters|arguments|args|kwargs|keyword arguments|keyword args|returns?|yields?|raises|"
    "warns|receives|see also|references?|examples?|attributes|methods|usages?|example usage|usage example|shape|"
    "inputs?|outputs?|call arguments|todo|bibliography|copyright|license"
)

NUMPY_RULE = re.compile(r"\s*[-=~^\"*#+]{3,}\s*$")
NUMPY_TABLE = re.compile(rf"\s*({TABLES})\s*:?\s*$", re.I)
GOOGLE_TABLE = re.compile(rf"(\s*)({TABLES})\s*(\([^)]*\))?\s*::?\s*$", re.I)
DIRECTIVE = re.compile(r"(\s*)\.\. ")
ADMONITION = re.compile(r"\s*\.\. (note|warning|tip|important|caution|hint)::\s*", re.I)
FIELD = re.compile(r"(\s*)(:\w[^:`]*:(\s|$)|@\w+)")
DOCTEST = re.compile(r"\s*(>>>|In \[)")
FENCE = re.compile(r"\s*(```|~~~)")

MARKUP = [
    (re.compile(r":[\w:]+:`[~!]?([^`<]*?)\s*(<[^`>]*>)?`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\((https?:|#)[^)]*\)"), r"\1"),
    (re.compile(r"<?https?://\S+"), ""),
    (re.compile(r"\s*\[[\w#*]+\]_"), ""),
    (re.compile(r"`+_{0,2}"), ""),
    (re.compile(r"\*{1,2}(\w[^*]*?)\*{1,2}"), r"\1"),
    (re.compile(r"</?[a-zA-Z][^>]*>"), ""),
    # A dotted name would give away which part of the library a passage belongs to.
    (re.compile(r"\b(?:[A-Za-z_]\w+\.)+([A-Za-z_]\w*)"), r"\1"),
    (re.compile(r"^\s*([-*•+]|\d+[.)]|#+)\s+"), ""),
    (re.compile(r"\s+"), " "),
]

PUNCTUATION = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " "})

FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the a an of to in is are be for and or that this with by on as if it not from which when at can will was "
        "has have used using each all any into its but should may must than then also only no one where",
    )
)


def clean(docstring: str) -> str:
    """The English prose of a docstring, one paragraph per line; empty if too little is left."""
    lines = inspect.cleandoc(docstring.translate(PUNCTUATION)).splitlines()
    paragraphs = (_plain(paragraph) for paragraph in _paragraphs(_prose_lines(lines)))
    text = "\n".join(paragraph for paragraph in paragraphs if is_english(paragraph))
    return text if len(text.split()) >= MIN_WORDS else ""


def _prose_lines(lines: list[str]) -> Iterator[str]:
    """Drop tables of parameters, code, doctests, directives and headings; what is dropped ends a paragraph."""
    position = 0
    while position < len(lines):
        line = lines[position]
        following = lines[position + 1] if position + 1 < len(lines) else ""
        if line.strip() and NUMPY_RULE.match(following):
            position += 2
            if NUMPY_TABLE.match(line):
                position = _next_heading(lines, position)
            yield ""
        elif ADMONITION.match(line):
            yield ""
            yield ADMONITION.sub("", line)
            position += 1
        elif FENCE.match(line):
            position = _after(lines, position + 1, FENCE)
            yield ""
        elif DOCTEST.match(line):
            position = _next_blank(lines, position)
            yield ""
        elif GOOGLE_TABLE.match(line) or DIRECTIVE.match(line) or FIELD.match(line):
            position = _after_block(lines, position)
            yield ""
        elif line.rstrip().endswith("::"):
            yield line.rstrip()[:-1]
            yield ""
            position = _after_block(lines, position)
        else:
            yield line
            position += 1


def _next_heading(lines: list[str], position: int) -> int:
    while position < len(lines):
        if position + 1 < len(lines) and lines[position].strip() and NUMPY_RULE.match(lines[position + 1]):
            return position
        position += 1
    return position


def _next_blank(lines: list[str], position: int) -> int:
    while position < len(lines) and lines[position].strip():
        position += 1
    return position


def _after(lines: list[str], position: int, end: re.Pattern[str]) -> int:
    while position < len(lines) and not end.match(lines[position]):
        position += 1
    return position + 1


def _after_block(lines: list[str], position: int) -> int:
    """The first line after `position` that is indented no deeper than it."""
    depth = _indent(lines[position])
    position += 1
    while position < len(lines) and (not lines[position].strip() or _indent(lines[position]) > depth):
        position += 1
    return position


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in (*lines, ""):
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []


def _plain(paragraph: str) -> str:
    """The paragraph without markup, on one line."""
    for pattern, replacement in MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    return paragraph.strip()


def is_english(paragraph: str) -> bool:
    """Whether a paragraph reads as English prose rather than as a formula, a table or another language."""
    words = paragraph.split()
    if len(words) < 4 or not paragraph.isascii() or "\\" in paragraph or "|" in paragraph:
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    functional = sum(word.lower().strip(".,:;()") in FUNCTION_WORDS for word in words)
    return letters >= 0.85 * len(paragraph) and functional >= 0.15 * len(words)


def is_repetition(text: str, seen: set[int]) -> bool:
    """Whether half of the five-word runs of `text` were `seen` before; if not, they are from now on."""
    words = re.findall(r"[a-z]+", text.lower())
    runs = {_run_key(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
    if 2 * len(runs & seen) >= len(runs):
        return True
    seen |= runs
    return False


def _run_key(words: list[str]) -> int:
    # Not hash(): that of strings differs from process to process, and a rare collision would too.
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "big")
