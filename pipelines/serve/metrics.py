"""Prometheus metrics of one server."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """`adapter` is the name that a response gives; `asked` is the model that the request named, or `step` for a
    `run/step`, of which there may be any number."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "curlora_requests", "Requests answered.", ("route", "status", "asked", "adapter"), registry=registry
        )
        self.tokens = Counter("curlora_tokens", "Tokens read and written.", ("kind", "adapter"), registry=registry)
        self.first_token = Histogram(
            "curlora_first_token_seconds", "Time to the first text.", ("asked",), buckets=SECONDS, registry=registry
        )
        self.latency = Histogram(
            "curlora_request_seconds", "Time to the end.", ("route", "asked"), buckets=SECONDS, registry=registry
        )
        self.swaps = Counter(
            "curlora_alias_changes", "Outcomes of following an alias.", ("alias", "outcome"), registry=registry
        )
        self.version = Gauge("curlora_alias_version", "Version that serves.", ("alias",), registry=registry)
        self.failing = Gauge(
            "curlora_alias_failing_version",
            "Version that should serve but does not load, else 0.",
            ("alias",),
            registry=registry,
        )
        self.unreachable = Gauge(
            "curlora_registry_unreachable", "1 if the registry cannot be asked.", registry=registry
        )
        self.running = Gauge("curlora_rows_running", "Answers being generated.", registry=registry)
        self.waiting = Gauge("curlora_requests_waiting", "Requests that wait for a place.", registry=registry)
        self.adapters = Gauge("curlora_adapters_loaded", "Adapters in memory.", registry=registry)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def asked_label(model: Any) -> str:
    """A label of bounded cardinality for the model that a request named."""
    return model if model in ("base", "champion", "candidate") else "step" if "/" in str(model) else "unknown"
