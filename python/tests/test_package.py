"""The package itself: the library is found or its absence explained, the public names and signatures stand."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import latte
import pytest
import torch
from latte import _library

PACKAGE = Path(latte.__file__).parent
CHECKOUT = Path(__file__).resolve().parents[2]


def import_with(library: Path) -> subprocess.CompletedProcess:
    environment = dict(os.environ, LATTE_OPS_LIBRARY=str(library), PYTHONPATH=str(PACKAGE.parent))
    return subprocess.run([sys.executable, "-c", "import latte"], env=environment, capture_output=True, text=True)


def test_public_names():
    assert all(hasattr(latte, name) for name in latte.__all__)
    assert {name for name in vars(latte) if not name.startswith("_")} >= set(latte.__all__)
    assert all(inspect.getdoc(getattr(latte, name)) for name in latte.__all__)
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize(
    "name, signature",
    [
        (
            "causal_attention",
            "query_logits, key_logits, values, *, log_decay=None, key_mask=None, initial_state=None, "
            "output_final_state=False, cu_seqlens=None",
        ),
        ("bidirectional_attention", "query_logits, key_logits, values, *, key_mask=None, cu_seqlens=None"),
        (
            "macchiato_attention",
            "query, key, values, query_logits, key_logits, *, window, sinks=0, sink_query=None, causal=True, scale=None, "
            "log_decay=None, key_mask=None, initial_state=None, output_final_state=False, cu_seqlens=None",
        ),
        ("merge_states", "left, right"),
    ],
)
def test_signatures(name, signature):
    parameters = inspect.signature(getattr(latte, name)).parameters.values()
    shown = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters]
    first = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if first is not None:
        shown.insert(first, "*")
    assert ", ".join(shown) == signature


def test_functions_reach_the_operators():
    torch.manual_seed(0)
    query_logits, key_logits, values = torch.randn(1, 5, 2, 3), torch.randn(1, 5, 1, 3), torch.randn(1, 5, 1, 4)
    out, state = latte.causal_attention(query_logits, key_logits, values)
    assert out.shape == (1, 5, 2, 4) and state is None
    state = latte.causal_attention(query_logits, key_logits, values, output_final_state=True)[1]
    pieces = [
        latte.causal_attention(query_logits[:, part], key_logits[:, part], values[:, part], output_final_state=True)[1]
        for part in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(latte.merge_states(*pieces), state)
    window, state = latte.window_attention(values.expand(1, 5, 2, 4), values, values, window=2, output_final_state=True)
    assert window.shape == (1, 5, 2, 4) and isinstance(state, latte.MacchiatoState) and state.position.tolist() == [5]
    mixed, none = latte.macchiato_attention(window, values, values, torch.randn(1, 5, 2, 4), key_logits, window=2)
    assert mixed.shape == window.shape and none is None
    with pytest.raises(ValueError):
        latte.causal_attention(query_logits, key_logits[:, :4], values)
    with pytest.raises(TypeError):
        latte.causal_attention(query_logits, key_logits.double(), values)


def test_versions_agree():
    project = re.search(r'^version = "(.+)"$', (CHECKOUT / "pyproject.toml").read_text(), re.M).group(1)
    cmake = re.search(r"project\(latte VERSION ([\d.]+)", (CHECKOUT / "CMakeLists.txt").read_text()).group(1)
    assert latte.__version__ == project == cmake


def test_a_missing_library_is_explained(tmp_path, monkeypatch):
    result = import_with(tmp_path / "nowhere.so")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        f"ImportError: LATTE_OPS_LIBRARY names {tmp_path / 'nowhere.so'}, which is not a file"
    )
    monkeypatch.delenv("LATTE_OPS_LIBRARY", raising=False)
    monkeypatch.setattr(_library, "candidates", lambda: [tmp_path / "liblatte_ops.so"])
    with pytest.raises(ImportError, match="pip install . --no-build-isolation") as caught:
        _library.find_library()
    assert str(tmp_path / "liblatte_ops.so") in str(caught.value)


def test_a_library_for_another_torch_is_explained(tmp_path):
    library = tmp_path / "liblatte_ops.so"
    library.write_bytes(_library.find_library().read_bytes())
    note = tmp_path / "liblatte_ops.torch.txt"
    note.write_text("1.9.0+cpu\n")
    result = import_with(library)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "was built against torch 1.9.0+cpu" in last and torch.__version__ in last and "pip install ." in last
    note.write_text(torch.__version__)
    assert import_with(library).returncode == 0


def test_a_broken_library_is_explained(tmp_path):
    library = tmp_path / "liblatte_ops.so"
    library.write_bytes(b"\x7fELF, cut short")
    result = import_with(library)
    assert result.returncode == 1
    assert "can't be loaded into torch" in result.stderr and "pip install ." in result.stderr.strip().splitlines()[-1]
