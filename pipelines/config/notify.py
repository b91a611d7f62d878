"""The section `notify:`, who is told of failures, refusals, promotions and drift.

Secrets are named and never written: `${NAME}` in the address and the name in `token` are environment variables, read
when a message is sent.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipelines.config.domains import Duration
from pipelines.config.sections import Section

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LOOPBACK = ("localhost", "127.0.0.1", "::1")

NotifiedEvent = Literal["failure", "refusal", "promotion", "drift"]


class NotifyConfig(Section):
    """Messages to a command or an address. They change no result and enter no fingerprint."""

    url: str | None = Field(
        None,
        description="http(s) address that every message is posted to as JSON; ${NAME} stands for an environment "
        "variable, read when it is sent; null: none.",
    )
    command: list[str] | None = Field(
        None,
        min_length=1,
        description="Command and arguments that read every message as JSON from standard input, without a shell; "
        "null: none.",
    )
    token: str | None = Field(
        None, description="Name of the environment variable that holds the bearer token of url; null: none."
    )
    events: list[NotifiedEvent] = Field(
        ["failure", "refusal", "promotion", "drift"],
        min_length=1,
        description="What is told: failure, refusal, promotion, drift.",
    )
    timeout: Duration = Field(10.0, gt=0, le=600, description="Time that one attempt may take, e.g. 10s.")
    attempts: int = Field(
        5, gt=0, le=100, description="Attempts per message and process, after pauses of 1, 2, 4, … seconds."
    )
    wait: Duration = Field(
        15.0,
        ge=0,
        le=3600,
        description="Time that a command waits at its end for messages; the next one tries the rest again.",
    )

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is None or VARIABLE.match(value):  # its scheme comes from the environment
            return value
        try:
            parts = urlsplit(value)
            has_port = parts.port is None or parts.port > 0
        except ValueError:
            parts, has_port = urlsplit(""), False
        if parts.scheme not in ("http", "https") or not parts.hostname or not has_port:
            raise ValueError("is no http(s) address; write e.g. https://hooks.example.org/${HOOK_SECRET}")
        if parts.username or parts.password:
            raise ValueError("contains a name or password; put it into an environment variable and name that in token")
        return value

    @field_validator("token")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not NAME.fullmatch(value):  # not shown: it may be the token itself
            raise ValueError("is no name of an environment variable; put the token into one and write its name")
        return value

    @model_validator(mode="after")
    def _tells_one(self):
        if (self.url is None) == (self.command is None):
            found = "neither url nor command is" if self.url is None else "url and command are both"
            raise ValueError(f"{found} set; set exactly one")
        if self.token and self.command:
            raise ValueError("token belongs to url; a command reads its own environment")
        if self.token and urlsplit(self.url).scheme == "http" and urlsplit(self.url).hostname not in LOOPBACK:
            raise ValueError("the token would be sent to url unencrypted; use https")
        return self

    @property
    def variables(self) -> list[str]:
        """Environment variables that it needs."""
        return [*VARIABLE.findall(self.url or ""), *([self.token] if self.token else [])]
