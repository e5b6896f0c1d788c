"""What `pip install . --no-build-isolation` gives: a wheel is built from the checkout and used in an environment of its own."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = CHECKOUT / "python" / "latte"
# As deep in the checkout as the build's folder and with its compiler, so that ccache knows every object from there.
BUILD = CHECKOUT / "build-package"

USE = """
import importlib.metadata, pathlib, sys
import latte, torch

assert pathlib.Path(sys.prefix) in pathlib.Path(latte.__file__).parents, latte.__file__
assert importlib.metadata.version("latte-attention") == latte.__version__
torch.manual_seed(0)
q, k, v = torch.randn(2, 50, 4, 3), torch.randn(2, 50, 4, 3), torch.randn(2, 50, 4, 5)
out, state = latte.causal_attention(q, k, v)
later = torch.ones(50, 50, dtype=torch.bool).triu(1)
logits = k.permute(0, 2, 3, 1).unsqueeze(3).expand(2, 4, 3, 50, 50).masked_fill(later, -torch.inf)
expected = torch.einsum("bthl,bhlts,bshd->bthd", q.softmax(-1), logits.softmax(-1), v)
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
module = latte.MacchiatoAttention(16, 2, batch_first=True, window=4)
module(torch.randn(2, 9, 16), is_causal=True)[0].sum().backward()
print(latte.__file__)
"""


def run(*command: object, **options) -> str:
    result = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def environment() -> dict[str, str]:
    """This process's, without what points Python at the checkout."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LATTE_OPS_LIBRARY")}
    return {"CCACHE_SLOPPINESS": "pch_defines,time_macros", "CCACHE_BASEDIR": str(CHECKOUT), **kept}


def compiler() -> str:
    cache = Path(os.environ.get("LATTE_BUILD_DIR", CHECKOUT / "build")) / "CMakeCache.txt"
    found = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache.read_text(), re.M) if cache.is_file() else None
    return found.group(1) if found else "c++"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-w", folder]
    options += ["-C", f"build-dir={BUILD}"]
    run(sys.executable, "-m", "pip", "wheel", *options, CHECKOUT, env=environment() | {"CXX": compiler()})
    (built,) = folder.iterdir()
    return built


def test_the_wheel_holds_the_package_alone(wheel):
    version = re.search(r'^version = "(.+)"$', (CHECKOUT / "pyproject.toml").read_text(), re.M).group(1)
    assert re.fullmatch(rf"latte_attention-{re.escape(version)}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"latte_attention-{version}.dist-info/METADATA").decode()
        built_against = archive.read("latte/liblatte_ops.torch.txt").decode().strip()
    sources = {f"latte/{path.name}" for path in PACKAGE.iterdir() if path.suffix in (".py", ".typed")}
    assert files == sources | {"latte/liblatte_ops.so", "latte/liblatte_ops.torch.txt"}
    assert re.findall(r"^Requires-Dist: (.+)$", metadata, re.M)[0] == "torch"
    assert built_against == torch.__version__


def test_the_package_works_where_it_is_installed(wheel, tmp_path):
    """In a fresh environment that sees this one's torch and nothing of the checkout."""
    home = tmp_path / "home"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, env=environment())
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch_of_the_project.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    shown = run(python, "-c", USE, cwd=tmp_path, env=environment())
    assert str(home) in shown
