from __future__ import annotations

from pathlib import Path

import pytest

from import_helpers import write_v1


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A v1 checkpoint of random weights with its .pkl."""
    return write_v1(tmp_path / "source" / "tiny.model")
