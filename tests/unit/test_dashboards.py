"""The Grafana dashboards of `cluster/grafana/`: each metric and label in them is exported by us or by Ray."""

import importlib.util
import json
import mmap
import re
from pathlib import Path

import pytest

from pipelines.serve.metrics import Metrics

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "grafana"
DASHBOARDS = sorted(FOLDER.glob("*.json"))
RAY = Path(importlib.util.find_spec("ray").origin).parent  # found, not imported
TELEMETRY = ("dashboard/modules/reporter/reporter_agent.py", "train/v2/_internal/metrics", "serve/_private")
BINARIES = ("core/src/ray/raylet/raylet", "core/src/ray/gcs/gcs_server")
ADDED = {"instance", "job", "le"}  # by Prometheus


def panels(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["panels"]


def expressions(path: Path) -> list[str]:
    found = [target["expr"] for panel in panels(path) for target in panel.get("targets", [])]
    asked = [v["query"] for v in json.loads(path.read_text())["templating"]["list"] if v["type"] == "query"]
    return found + [
        re.fullmatch(r"label_values\((\w+), (\w+)\)", query).expand(r"sum by (\2) (\1)") for query in asked
    ]


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """(metric, labels that are asked of it); labels of an aggregation are asked of each of its metrics."""
    grouped = {name for names in re.findall(r"by \(([\w, ]+)\)", expression) for name in names.split(", ")}
    rest = re.sub(r"by \([\w, ]+\)", "", expression)
    found = re.findall(r"\b((?:ray|curlora)_\w+)(?:\{(.*?)\})?", rest)
    return [(name, grouped | set(re.findall(r"(\w+)=~?\"", matchers))) for name, matchers in found]


def exported() -> dict[str, set[str]]:
    """Metrics of `curlora serve`, by the names that Prometheus sees, with their labels."""
    found = {}
    for family in Metrics().registry.collect():
        ours = next(m for m in vars(Metrics()).values() if getattr(m, "_name", None) == family.name)
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        found |= {family.name + end: set(ours._labelnames) for end in ends}
    return found


def _literals() -> str:
    files = [
        file for name in TELEMETRY for file in ([RAY / name] if name.endswith(".py") else (RAY / name).glob("*.py"))
    ]
    return "".join(file.read_text() for file in files)


def _native(name: str) -> bool:
    """Whether Ray's C++ processes know the name and Ray's own dashboards ask for it."""
    asked = any(f"ray_{name}" in file.read_text() for file in (RAY / "dashboard/modules/metrics").rglob("*panels.py"))
    counter = name.removesuffix("_total")  # which the exporter adds
    for binary in BINARIES:
        with (RAY / binary).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if asked and content.find(b"\0" + counter.encode() + b"\0") >= 0:
                return True
    return False


def unknown_metrics(found: list[str], literals: str) -> list[str]:
    ours, wrong = exported(), []
    for name, labels in (selector for expression in found for selector in selectors(expression)):
        if name in ours:
            wrong += [f"{name}: {label}" for label in labels - ours[name] - ADDED]
        elif name.startswith("curlora_") or not (
            f'"{name.removeprefix("ray_")}"' in literals or _native(name.removeprefix("ray_"))
        ):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_metric_and_label_exists(path):
    assert unknown_metrics(expressions(path), _literals()) == []


def test_serving_shows_everything_that_the_server_measures():
    shown = {name for found in expressions(FOLDER / "serving.json") for name, _ in selectors(found)}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported()} <= bases


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("sum(rate(curlora_requests{status='429'}[5m]))", ["curlora_requests"]),  # the counter ends in _total
        ('sum by (model) (curlora_requests_total{status=~"5.."})', ["curlora_requests_total: model"]),
        ("ray_train_contoller_state", ["ray_train_contoller_state"]),
        ("ray_node_manager_unexpected_worker_failures", ["ray_node_manager_unexpected_worker_failures"]),
        ("ray_placement_groups + ray_node_cpu_count + ray_train_controller_state", []),
    ],
)
def test_a_metric_that_does_not_exist_is_seen(expression, expected):
    assert unknown_metrics([expression], _literals()) == expected


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_say_what_they_show_and_do_not_overlap(path):
    found, places = panels(path), set()
    assert len({panel["id"] for panel in found}) == len(found)
    for panel in found:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert x + w <= 24 and not cells & places, panel["title"]
        places |= cells
        assert panel["type"] == "row" or (panel["title"] and panel["description"] and panel["targets"])
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}", "no server of ours in a dashboard for others"
