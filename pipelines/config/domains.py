"""The section `domains:`, for `curlora tick` and `curlora schedule`: where new domains arrive and when to look."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from pipelines.config.sections import Section, check_name
from pipelines.config.tasks import TASKS
from pipelines.errors import did_you_mean

DURATION = re.compile(r"(\d+(?:\.\d+)?) *([smhd]?)")


def _seconds(value: Any) -> Any:
    """Convert `90`, `"30s"`, `"10m"`, `"2h"` or `"1d"` to seconds; leave anything else to validation."""
    found = DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else value


Duration = Annotated[float, Field(ge=0), BeforeValidator(_seconds)]


class DriftConfig(Section):
    """Whether the champion has become worse on recent text, measured by `curlora tick`."""

    sample: str = Field(
        min_length=1,
        description="File or URI of recent prompts (.jsonl, .csv, .txt, …), replaced or appended to as new ones come.",
    )
    text: str = Field("text", min_length=1, description="Field with the text.")
    max_perplexity_ratio: float = Field(
        1.2,
        ge=1,
        le=1.0e6,
        description="Largest perplexity on the sample, relative to the champion's first one.",
    )
    max_rows: int = Field(1000, gt=0, le=10**7, description="Texts that are scored: the last ones of the sample.")
    retrain: bool = Field(
        False, description="Above the limit, train the sample as a new domain; needs a template for text."
    )
    domain: str = Field("recent", description="Name of the domain that a sample becomes with retrain.")

    @field_validator("domain")
    @classmethod
    def _safe(cls, value: str) -> str:
        return check_name(value)


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
    drift: DriftConfig | None = Field(
        None, description="Recent text on which each tick scores the champion; null: none."
    )

    @model_validator(mode="after")
    def _sample_can_be_trained(self):
        template = {"kind": None, "text": "text", **self.template}
        if self.drift and self.drift.retrain:
            if template["kind"] != "language-modeling":
                remedy = "set retrain: false and put rows with answers into the inbox"
                raise ValueError(f"drift.retrain trains text, but the template is for {template['kind']}; {remedy}")
            if template["text"] != self.drift.text:
                raise ValueError(
                    f"drift.text is '{self.drift.text}', but the template trains '{template['text']}'; use one name"
                )
        return self

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
