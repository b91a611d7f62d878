"""The report in a real browser: on a screen, a phone and paper."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from sample_run import make_run

from pipelines.reporting.page import write_report
from tests.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")

VERDICT = {
    "passed": False,
    "reasons": ["mrpc: accuracy 0.9000 → 0.7400, a loss of 0.1600 over the limit 0.02 (exact McNemar test, p = 1e-9)"],
    "notes": [],
    "against": {"name": "support-bot", "version": 3, "run_uri": "/runs/before"},
    "comparisons": [
        {
            "name": "mrpc",
            "role": "task",
            "metric": "accuracy",
            "champion": 0.9,
            "candidate": 0.74,
            "loss": 0.16,
            "limit": 0.02,
            "p": 1e-9,
            "test": "exact McNemar test",
            "examples": 200,
            "refused": True,
        }
    ],
}
REGISTRY = {"name": "support-bot", "version": 4, "uri": "models:/support-bot/4", "promoted": False}
# the widest thing that is neither in a scrolling box nor the page itself
OVERFLOW = """Math.max(...[...document.querySelectorAll('main *')]
    .filter(e => !e.closest('.scroll')).map(e => e.getBoundingClientRect().right))"""


def written(folder: Path, **options) -> str:
    run = make_run(folder, **options)
    run.write_json("results.json", replace(run.results(), gate=VERDICT, registry=REGISTRY))
    return f"file://{run.path(write_report(run))}"


async def looked_at(url: str, width: int, profile: Path) -> dict:
    """What a person would notice."""
    async with Browser(profile) as browser:
        await browser.open(url, width)
        seen = {
            "page_width": await browser.value("document.documentElement.scrollWidth"),
            "overflow": await browser.value(OVERFLOW),
            "images": await browser.value(
                "[...document.images].map(i => ({drawn: i.complete && i.naturalWidth > 0, alt: i.alt}))"
            ),
            "smallest_text": await browser.value(
                "Math.min(...[...document.querySelectorAll('main *')].filter(e => e.innerText)"
                ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
            ),
            "headings": await browser.value("[...document.querySelectorAll('h2')].map(h => h.innerText)"),
            "pdf": await browser.pdf(),
        }
        seen |= {"complaints": browser.complaints(), "requested": browser.requested()}
    return seen


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("tasks", [("mrpc", "sst2", "biomed"), tuple(f"t{k}" for k in range(20))], ids=len)
def test_page_is_whole_on_screen_phone_and_paper(tmp_path, width, tasks):
    prompts = ["Who are you?", "a-word-without-any-space-" * 40, "many words " * 300]
    url = written(tmp_path, tasks=tasks, evaluation={"samples": {"prompts": prompts}})
    seen = asyncio.run(looked_at(url, width, tmp_path / "profile"))
    assert seen["complaints"] == []
    assert [address for address in seen["requested"] if not address.startswith("data:")] == [url]
    assert seen["page_width"] <= width and seen["overflow"] <= width
    assert len(seen["images"]) >= 4
    assert all(image["drawn"] and len(image["alt"]) > 20 for image in seen["images"])
    assert seen["smallest_text"] >= 11
    assert {"Score matrix", "What it says", "Gate refused", "Ancestry", "Configuration"} <= set(seen["headings"])
    assert seen["pdf"].startswith(b"%PDF") and seen["pdf"].count(b"/Type /Page\n") >= 2
