"""Fixtures that several files of tests share."""

import shutil
import sysconfig
from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A small text to train on."""
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be: that is the question.\n" * 40)
    return path


@pytest.fixture
def inductor() -> None:
    """What torch.compile's own backend needs. Without it the test fails: skipped, it would be missed by nobody."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    assert header.is_file(), f"torch's inductor compiles with {header}, which is missing (python3-dev): scripts/setup.sh"
    assert shutil.which("g++") or shutil.which("clang++"), "torch's inductor needs a C++ compiler"
