"""Reads YAML text: small, flat enough, without aliases that multiply, and with every key once.

YAML 1.1 as PyYAML's safe loader reads it, except that 3e-3 is a number. What the loader would take silently (a key
given twice), never end on (aliases of aliases) or break down on (thousands of levels) is an error with its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

CHARACTERS = 1_000_000
LEVELS = 40
VALUES = 100_000  # with every alias written out


class YamlError(ValueError):
    """What is wrong with a text, and on which line."""


class _Loader(yaml.SafeLoader):
    """Reads 3e-3 as a number; YAML 1.1 would read it as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_text(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        YamlError: it is not YAML, exceeds a limit, contains itself, gives a key twice, or a value that cannot be.
    """
    if len(text) > CHARACTERS:
        raise YamlError(f"has {len(text):,} characters, a configuration may have {CHARACTERS:,}")
    try:
        _check_depth(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(node, {}, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"not valid YAML: a value cannot be read ({error}); put it in quotes") from error


def _check_depth(text: str) -> None:
    """Refuse deep nesting before anything descends into it; the events themselves come without recursion."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > LEVELS:
                raise YamlError(f"line {event.start_mark.line + 1}: more than {LEVELS} levels of nesting")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _size(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """Number of values of a node with its aliases written out.

    Args:
        sizes: of the nodes that have been counted, by identity.
        above: identities of the nodes that this one lies in.
    """
    if id(node) in above:
        raise YamlError(f"{_line(node)}: an anchor contains itself")
    if id(node) not in sizes:
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        inside = above | {id(node)}
        sizes[id(node)] = 1 + sum(_size(child, sizes, inside) for child in _children(node))
        if sizes[id(node)] > VALUES:
            raise YamlError(f"{_line(node)}: stands for more than {VALUES:,} values; write fewer aliases")
    return sizes[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_keys(node: yaml.MappingNode) -> None:
    first: dict[str, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise YamlError(f"{_line(key)}: a key is {key.id}; write a name")
        if key.value in first:
            before = _line(first[key.value])
            raise YamlError(f"{_line(key)}: '{key.value}' is given twice, first on {before}; remove one")
        first[key.value] = key


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
