"""Messages that are to be delivered, and the record of every attempt, beside what they tell of.

    notify/<id>.json                  the message; <id> is its kind and a digest of what it tells
    notify/<id>.<n>.begun             attempt n, created before it: no other process makes the same one
    notify/<id>.<n>.<outcome>.json    its outcome: delivered, failed (certainly not delivered) or unknown

A message is tried again only after an attempt that failed. One whose process died on the way, or whose receiver took
the message and did not answer, is unknown and not repeated: the receiver may have it. One listing tells all of this.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.config.notify import NotifiedEvent, NotifyConfig
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import fingerprint

FOLDER = "notify"
TEXT_LENGTH = 2000
DELIVERED, FAILED, UNKNOWN = "delivered", "failed", "unknown"


@dataclass(frozen=True)
class Attempt:
    """The next attempt to deliver a message."""

    id: str
    number: int


def post(
    folder: RunDirectory, notify: NotifyConfig | None, kind: NotifiedEvent, key: Sequence[Any], text: str, **facts: Any
) -> None:
    """Write a message, unless it was written before or this kind is not told.

    Args:
        folder: run directory, or folder of a schedule.
        key: what makes the event the same if it is told again, e.g. after a resume.
        text: one sentence; facts: further fields of the message.
    """
    if notify is None or kind not in notify.events:
        return
    name = f"{kind}-{fingerprint([kind, *key])[:16]}"
    if not folder.exists(f"{FOLDER}/{name}.json"):
        message = {"id": name, "event": kind, "time": time.time(), "text": text[:TEXT_LENGTH], **facts}
        folder.write_json(f"{FOLDER}/{name}.json", message)


def waiting(folder: RunDirectory) -> list[Attempt]:
    """The next attempt of every message that certainly was not delivered."""
    begun: dict[str, int] = {}
    ended: dict[tuple[str, int], str] = {}
    names = folder.list(FOLDER)
    for name in names:
        message, *rest = name.split(".")
        if rest[1:] == ["begun"]:
            begun[message] = max(begun.get(message, 0), int(rest[0]))
        elif len(rest) == 3:
            ended[message, int(rest[0])] = rest[1]
    messages = [name.removesuffix(".json") for name in names if name.count(".") == 1]
    last = {message: begun.get(message, 0) for message in messages}
    return [Attempt(m, n + 1) for m, n in last.items() if n == 0 or ended.get((m, n)) == FAILED]


def begin(folder: RunDirectory, attempt: Attempt) -> dict | None:
    """Claim an attempt and read its message; None if another process makes it."""
    message = folder.read_json(f"{FOLDER}/{attempt.id}.json")
    claim = json.dumps({"time": time.time()}).encode()
    return message if folder.create(f"{FOLDER}/{attempt.id}.{attempt.number}.begun", claim) else None


def end(folder: RunDirectory, attempt: Attempt, outcome: str, reason: str) -> None:
    """Record how an attempt ended."""
    record = {"time": time.time(), "reason": reason}
    folder.write_json(f"{FOLDER}/{attempt.id}.{attempt.number}.{outcome}.json", record)
