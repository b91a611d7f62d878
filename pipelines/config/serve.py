"""The section `serve:`, for `curlora serve`: where the server listens, how much it holds at once, the canary."""

from __future__ import annotations

from pydantic import Field

from pipelines.config.domains import Duration
from pipelines.config.sections import Section


class ServeConfig(Section):
    """The server of `curlora serve`. It changes no result and enters no fingerprint."""

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; others than loopback need a token."
    )
    port: int = Field(8000, gt=0, le=65_535, description="Port of the HTTP routes.")
    canary: float = Field(
        0.0, ge=0, le=1, description="Share of the requests for the champion that the candidate answers, from 0 to 1."
    )
    poll: Duration = Field(
        2.0, gt=0, le=3600, description="Time between two looks at the registry's aliases, e.g. 2s."
    )
    batch_tokens: int = Field(
        16_384, gt=0, le=2**31, description="Tokens of prompts and answers in the batch at once, padding included."
    )
    batch_rows: int = Field(64, gt=0, le=4096, description="Answers that are generated at once.")
    queue: int = Field(256, ge=0, le=10**6, description="Requests that may wait; further ones are refused with 429.")
    max_new_tokens: int = Field(
        1024, gt=0, le=2**21, description="Longest answer in tokens; also of requests that do not name a limit."
    )
    timeout: Duration = Field(
        300.0, gt=0, le=86_400, description="Time that a request may take, waiting included, e.g. 5m."
    )
    drain: Duration = Field(
        30.0, ge=0, le=86_400, description="Time that running requests have to finish when the server is stopped."
    )
    cpus: int = Field(
        1, gt=0, le=10_000, description="CPU cores that Ray reserves for the model, and its threads on a CPU."
    )
    max_adapters: int = Field(
        32, gt=0, le=4096, description="Adapters in memory; the one unused for longest makes room."
    )
