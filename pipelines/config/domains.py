"""The section `domains:`: the inbox of new domains and when to look into it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from pipelines.config.sections import Section
from pipelines.config.tasks import TASKS
from pipelines.errors import did_you_mean

DURATION = re.compile(r"(\d+(?:\.\d+)?) *([smhd]?)")


def _seconds(value: Any) -> Any:
    """`90`, `"30s"`, `"10m"`, `"2h"`, `"1d"` as seconds."""
    found = DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else value


Duration = Annotated[float, Field(ge=0), BeforeValidator(_seconds)]


class DomainsConfig(Section):
    """New domains that train by themselves: what `curlora tick` and `curlora schedule` go by."""

    inbox: str = Field(description="folder or URI with a folder for every domain, of {train,test}.<format>")
    template: dict[str, Any] = Field(description="the task that a domain becomes, without name and data")
    marker: str = Field("_SUCCESS", description="file whose presence says that a domain is complete")
    quiet_period: Duration = Field(600.0, description="a domain without the marker is complete after so long a rest")
    address: str | None = Field(None, description="dashboard of the cluster that trains; null: RAY_API_SERVER_ADDRESS")
    shared_paths: bool = Field(False, description="every node mounts the paths here as this machine does")
    cron: str = Field("0 3 * * *", description="when curlora schedule looks: minute hour day month weekday")
    timezone: str = Field("UTC", description="of cron, e.g. Europe/Berlin")
    catch_up: Literal["once", "skip"] = Field("once", description="what to do about times that were missed")
    follow_up: Duration = Field(60.0, gt=0, description="between two looks while a job is at work")
    max_attempts: int = Field(3, gt=0, description="jobs that may break off before a domain is given up")

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
