"""kill -9 in the middle of training and of a conversion: scripts/kill_training.py, a few times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_extend import write_model

BUILD = Path(os.environ.get("LATTE_BUILD_DIR", Path(__file__).parents[2] / "build"))
LATTE = BUILD / "latte"

pytestmark = pytest.mark.skipif(not (LATTE.exists() and (BUILD / "latte-torch").exists()), reason="the programs aren't built")


@pytest.mark.parametrize("what", ["text", "task", "extend"])
def test_killed_runs_end_as_if_nothing_had_been(tmp_path, what):
    options = {"text": [], "task": ["--task"], "extend": ["--extend", write_model(tmp_path / "tiny.gguf")]}[what]
    script = Path(__file__).parents[2] / "scripts" / "kill_training.py"
    result = subprocess.run([sys.executable, script, "--kills", "4", *options, "--latte", LATTE], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 runs ended bit for bit" in result.stdout
