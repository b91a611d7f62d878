"""Where the shared data and model lie, and what is skipped without them."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real datasets and the small pretrained model, beside the repository."""
    if not (SHARED / "data").is_dir() or not (SHARED / "models" / "tiny-llama").is_dir():
        pytest.skip("needs ../shared/data and ../shared/models beside the repository")
    return SHARED
