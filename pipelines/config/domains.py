"""The section `domains:`, for `curlora tick` and `curlora schedule`: where new domains arrive and when to look."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from pipelines.config.sections import Section
from pipelines.config.tasks import TASKS
from pipelines.errors import did_you_mean

DURATION = re.compile(r"(\d+(?:\.\d+)?) *([smhd]?)")


def _seconds(value: Any) -> Any:
    """Convert `90`, `"30s"`, `"10m"`, `"2h"` or `"1d"` to seconds; leave anything else to validation."""
    found = DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else value


Duration = Annotated[float, Field(ge=0), BeforeValidator(_seconds)]


class DomainsConfig(Section):
    """Continual training on domains that arrive in an inbox, by `curlora tick` and `curlora schedule`."""

    inbox: str = Field(description="Folder or URI with one folder per domain, which holds {train,test}.<format>.")
    template: dict[str, Any] = Field(description="Task that a domain becomes; name and data come from its folder.")
    marker: str = Field("_SUCCESS", description="File whose presence marks a domain as complete.")
    quiet_period: Duration = Field(
        600.0,
        ge=0,
        le=1.0e7,
        description="Time without changes after which a domain without marker is complete, e.g. 10m.",
    )
    address: str | None = Field(None, description="Dashboard URL of the Ray cluster; null: RAY_API_SERVER_ADDRESS.")
    shared_paths: bool = Field(False, description="All nodes mount the paths of this machine.")
    cron: str = Field("0 3 * * *", description="When curlora schedule looks: minute hour day month weekday.")
    timezone: str = Field("UTC", description="Time zone of cron, e.g. Europe/Berlin.")
    catch_up: Literal["once", "skip"] = Field(
        "once", description="Missed cron times: look once for all, or skip them."
    )
    follow_up: Duration = Field(
        60.0, gt=0, le=1.0e7, description="Time between two looks while a job is running, e.g. 1m."
    )
    max_attempts: int = Field(3, gt=0, le=10**6, description="Jobs that may fail before a domain is given up.")

    @field_validator("template")
    @classmethod
    def _is_a_task(cls, value: dict[str, Any]) -> dict[str, Any]:
        if own := sorted({"name", "data"} & set(value)):
            raise ValueError(f"{own[0]} comes from the domain's folder; remove it")
        kind = value.get("kind")
        if kind not in TASKS:
            raise ValueError(f"kind: unknown kind {kind!r}, {did_you_mean(str(kind), TASKS)}")
        try:
            TASKS[kind](name="domain", data="inbox", **value)
        except ValidationError as error:
            found = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, found['loc'])) or kind}: {found['msg']}") from error
        return value

    @field_validator("marker")
    @classmethod
    def _is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", value) or value in (".", ".."):
            raise ValueError(f"'{value}' is not a file name; use letters, digits, '.', _ and -")
        return value
