"""The import rule: a package imports only what stands left of it, and no files import each other in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (
    ("errors", "metrics"),
    ("config",),
    ("distributed", "runs"),
    ("data",),
    ("models",),
    ("notify", "preflight", "bases", "demo", "lineage", "evaluation", "training"),
    ("reporting",),
    ("workers", "promotion", "inference"),
    ("search", "serve"),
    ("chain",),
    ("comparison",),
    ("cli",),
)
FLOOR = {package: number for number, packages in enumerate(FLOORS) for package in packages}
ROOTS = ("curlora", "pipelines", "cluster")  # each imports only those before it
ENTRIES = {"__main__", "serving"}  # of pipelines: `python -m pipelines`, and the face that old models import


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for root in ROOTS for file in (ROOT / root).rglob("*.py")}


def imports(module: str, source: str | None = None) -> set[str]:
    """Modules of this project that a module imports, anywhere in its code."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source or FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *base.split(".")])
            base = base.rstrip(".")
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return (found & FILES.keys()) - {module}


def breaks_the_rule(module: str, imported: str) -> bool:
    (root, *inner), (other, *target) = module.split("."), imported.split(".")
    if root != other:
        return ROOTS.index(other) > ROOTS.index(root)
    if root != "pipelines" or not inner or inner[0] in ENTRIES:
        return False
    return inner[0] != target[0] and FLOOR[target[0]] >= FLOOR[inner[0]]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other; empty where there are none."""
    left = {module: set(targets) for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_only_what_stands_left_of_its_package(module):
    assert [name for name in sorted(imports(module)) if breaks_the_rule(module, name)] == []


def test_no_files_import_each_other_in_a_circle():
    assert circle({module: imports(module) for module in FILES}) == []


def test_an_arrow_turned_round_is_found():
    assert breaks_the_rule("pipelines.runs.directory", "pipelines.chain.driver")
    assert breaks_the_rule("pipelines.data.sources", "cluster.tick")
    graph = {module: imports(module) for module in FILES}
    graph["pipelines.runs.directory"] = imports(
        "pipelines.runs.directory", "def late():\n    from pipelines.runs.lease import Lease\n"
    )
    assert {"pipelines.runs.directory", "pipelines.runs.lease"} <= set(circle(graph))


def longest(kind: type | tuple, source: str) -> int:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kind)]
    return max((node.end_lineno - node.lineno + 1 for node in nodes), default=0)


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_reader_can_take_in_each_module_class_and_function(module):
    source = FILES[module].read_text()
    assert len(source.splitlines()) <= 450
    assert longest(ast.ClassDef, source) <= 300
    assert longest((ast.FunctionDef, ast.AsyncFunctionDef), source) <= 50
