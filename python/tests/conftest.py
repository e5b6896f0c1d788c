"""Fixtures that several files of tests share."""

from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A small text to train on."""
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be: that is the question.\n" * 40)
    return path
