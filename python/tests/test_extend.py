"""latte extend and latte eval, as a user runs them, on a model of two small layers."""

import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

BUILD = Path(os.environ.get("LATTE_BUILD_DIR", Path(__file__).parents[2] / "build"))
LATTE = BUILD / "latte"

pytestmark = pytest.mark.skipif(not (LATTE.exists() and (BUILD / "latte-torch").exists()), reason="the programs aren't built")

SHORT = ["--window", "8", "--sinks", "2", "--latents", "4", "--context", "64", "--match-sequences", "2", "--match-steps", "4"]
SHORT += ["--dtype", "float32", "--threads", "1", "--held-out-fraction", "0.1"]


def latte(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([LATTE, *map(str, arguments)], capture_output=True, text=True)


def assert_fails(result: subprocess.CompletedProcess, *parts: str, code: int = 1) -> None:
    assert result.returncode == code, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("latte: error: "), result.stderr
    for part in parts:
        assert part in last


def text_bytes(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_bytes(value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + text_bytes(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text_bytes, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def write_model(path: Path, seed: int = 1, name: str = "Tiny") -> Path:
    """A llama of random weights with a vocabulary of letters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = ["<|end|>", *letters, "\u0120", "\u010a", "ab"]
    sizes = {
        "vocab_size": len(tokens),
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 8,
    }
    metadata = {"general.architecture": "llama", "general.name": name, **{f"llama.{key}": size for key, size in sizes.items()}}
    metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    shapes = {"token_embd.weight": [32, len(tokens)], "output_norm.weight": [32]}
    for block in range(2):
        layer = {"attn_norm": [32], "attn_q": [32, 32], "attn_k": [32, 16], "attn_v": [32, 16], "attn_output": [32, 32]}
        layer |= {"ffn_norm": [32], "ffn_gate": [32, 48], "ffn_up": [32, 48], "ffn_down": [48, 32]}
        shapes |= {f"blk.{block}.{part}.weight": shape for part, shape in layer.items()}
    numbers = random.Random(seed)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata))
    head += b"".join(text_bytes(key) + value_bytes(value) for key, value in metadata.items())
    data = b""
    for tensor, shape in shapes.items():
        head += text_bytes(tensor) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        norm = len(shape) == 1
        data += struct.pack(f"<{count}f", *(1.0 if norm else numbers.gauss(0, 0.3) for _ in range(count)))
        data += b"\0" * (-len(data) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.gguf")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i * i % 97} of a text with {i % 7}\n" for i in range(400)))
    return path


def extend(model: Path, text: Path, out: Path, *more) -> subprocess.CompletedProcess:
    return latte("extend", model, "--text", text, "--out", out, *SHORT, *more)


def test_convert_and_compare(tmp_path, model, text):
    adapter, control, full = tmp_path / "a.gguf", tmp_path / "control.gguf", tmp_path / "full.gguf"
    result = extend(model, text, adapter, "--tokens", 256, "--json", "--quiet")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["step"] == report["steps"] == 4 and report["tokens"] == 256 and len(report["layers"]) == 2
    assert set(report["held_out"]) == {"window_sinks", "matched", "trained", "latents_off"}
    assert report["adapter_bytes"] == adapter.stat().st_size
    metrics = [json.loads(line) for line in (tmp_path / "a.gguf.run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4] and metrics[-1]["val_loss"] is not None
    for out, attention, loss in ((control, "window-sinks", "kl"), (full, "full", "text")):
        assert extend(model, text, out, "--tokens", 128, "--attention", attention, "--loss", loss).returncode == 0

    evaluated = ["eval", model, "--adapter", adapter, "--text", text, "--lengths", "64,256", "--windows", 2, "--threads", 1]
    result = latte(*evaluated, "--control", control, "--full-adapter", full, "--json", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    kinds = ["full", "full-ntk", "full-yarn", "full-uptrained", "window", "window-sinks", "window-sinks-uptrained"]
    kinds += ["macchiato", "macchiato-latents-off"]
    assert [(row["attention"], row["length"]) for row in rows] == [(kind, length) for kind in kinds for length in (64, 256)]
    for row in rows:
        assert row["perplexity"] > 1 and row["seconds"] > 0 and row["stderr"] > 0 and row["windows"] == 2
        assert (row["kl"] is None) == (row["length"] > 128)  # the trained context
        full = next(other for other in rows if other["length"] == row["length"])
        if row is full:
            assert "over_full" not in row
        else:
            assert row["over_full"]["loss"] == pytest.approx(row["loss"] - full["loss"]) and row["over_full"]["windows"] == 2
        assert sum(bucket["to"] - bucket["from"] for bucket in row["buckets"]) == row["length"]
    states = {row["length"]: row["state_bytes"] for row in rows if row["attention"] == "macchiato"}
    assert states[64] == states[256] > 0
    assert len(rows[-4]["latent_shares"]) == 2 and 0 < rows[-4]["latent_shares"][0][0] < 1

    # As text, by position, with a picture; full attention reads a long stretch once.
    few = ["--attention", "full,full-ntk,macchiato", "--lengths", "128,1024", "--quadratic-limit", 512, "--rope-factor", 8]
    plot = tmp_path / "curve"
    table = latte("eval", model, "--adapter", adapter, "--text", text, "--windows", 2, "--threads", 1, *few, "--plot", plot)
    assert table.returncode == 0, table.stderr
    counts = re.findall(r"^(full|full-ntk|macchiato) +1024 +(\d) ", table.stdout, re.MULTILINE)
    assert counts == [("full", "1"), ("full-ntk", "1"), ("macchiato", "2")]
    assert re.search(r"^full-ntk +128 +2 +\d+\.\d+ +\d+\.\d+ +[+-]\d+\.\d ± \d+\.\d ", table.stdout, re.MULTILINE)
    assert re.search(r"^macchiato +1024 +2 +\d+\.\d+ +\d+\.\d+ +[+-]\d+\.\d +- ", table.stdout, re.MULTILINE)
    _, positions = table.stdout.split("perplexity up to position\n")
    assert positions.split("\n")[0].split() == ["attention", "128", "256", "512", "1024"]
    assert re.search(r"^macchiato( +\d+\.\d+){4}\n  standard error( +\d+\.\d+){4}$", positions, re.MULTILINE)
    assert re.search(r"^  KL to the original +\d+\.\d+ +- +- +-$", positions, re.MULTILINE)
    assert re.search(r"^layer 1( +\d+\.\d){4}$", positions, re.MULTILINE)
    if shutil.which("gnuplot"):
        assert "macchiato" in plot.with_suffix(".svg").read_text()
        assert plot.with_suffix(".png").read_bytes()[1:4] == b"PNG"


def test_a_merged_model_goes_everywhere(tmp_path, model, text):
    adapter, merged = tmp_path / "a.gguf", tmp_path / "merged.gguf"
    nowhere = tmp_path / "none" / "merged.gguf"
    assert_fails(extend(model, text, adapter, "--merged", nowhere), str(nowhere))
    assert not adapter.exists()
    assert extend(model, text, adapter, "--merged", merged, "--storage", "f32", "--tokens", 320).returncode == 0
    recipe = json.loads(latte("inspect", merged, "--json").stdout)["adapter"]["recipe"]
    assert recipe["window"] == 8 and recipe["text"] == ["text.txt"]

    asked = ("--text", text, "--lengths", 64, "--windows", 1, "--dtype", "float32", "--json")
    rows = [json.loads(latte("eval", *which, *asked).stdout)["rows"] for which in ([merged], [model, "--adapter", adapter])]
    kinds = ["macchiato", "macchiato-latents-off"]
    assert [row["attention"] for row in rows[0]] == kinds and all(row["kl"] is None for row in rows[0])
    losses = [[row["loss"] for row in of if row["attention"] in kinds] for of in rows]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] == pytest.approx(rows[0][0]["stretch_losses"][0])
    assert_fails(latte("eval", merged, "--attention", "full", *asked), "full needs the original model", code=2)
    for flag in ("--adapter", "--control", "--full-adapter"):
        assert_fails(latte("eval", merged, flag, adapter, *asked), f"{flag} is for an original model", code=2)
    assert_fails(extend(merged, text, tmp_path / "again.gguf"), "is converted already", code=2)
    assert not (tmp_path / "again.gguf.run").exists()

    asked = ("--prompt", "line 5 of a", "--tokens", 12, "--temperature", 0)
    written = [latte("generate", *which, *asked) for which in ([merged], [model, "--adapter", adapter])]
    assert written[0].returncode == 0, written[0].stderr
    assert written[0].stdout == written[1].stdout


def test_retrieval_tasks(model):
    result = latte("eval", model, "--tasks", "passkey,recall", "--task-lengths", 400, "--trials", 2, "--pairs", 3, "--json",
                   "--depths", "0.2,0.8", "--attention", "full,window-sinks")  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [(row["attention"], row["depth"]) for row in report["passkey"]] == [
        (kind, depth) for kind in ("full", "window-sinks") for depth in (0.2, 0.8)
    ]
    for row in report["passkey"]:
        assert len(row["right_tokens"]) >= 1 and row["right"] <= min(row["right_tokens"]) <= row["asked"]
    assert all(row["asked"] == 2 for row in report["passkey"]) and all(row["asked"] == 6 for row in report["recall"])


@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGINT, ()), (signal.SIGTERM, ("--floor", "--position", "conv", "--no-forget"))]
)
def test_an_interrupted_run_resumes(tmp_path, model, text, number, options):
    out = tmp_path / "a.gguf"
    command = [LATTE, "extend", model, "--text", text, "--out", out, *SHORT, *options]
    command += ["--tokens", str(64 * 10**6), "--eval-every", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "a.gguf.run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == 130 and "interrupted and saved" in errors
    steps = metrics.read_text().count("\n")
    result = latte("extend", "--resume", "--out", out, "--tokens", 64 * (steps + 2), "--quiet", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["step"] == steps + 2
    assert not list(tmp_path.glob(".a.gguf*"))


def test_matching_is_interrupted_and_goes_on(tmp_path, model, text):
    out = tmp_path / "a.gguf"
    command = [LATTE, "extend", model, "--text", text, "--out", out, *SHORT, "--match-steps", "1000000", "--tokens", "320"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "matching" not in (line := process.stderr.readline()):
        assert line, process.wait()
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130 and "interrupted in matching and saved, the first 0 layers" in errors
    assert not out.exists() and (tmp_path / "a.gguf.run" / "checkpoint.safetensors").exists()
    assert_fails(extend(model, text, out), "--resume", code=2)
    result = latte("extend", "--resume", "--out", out, "--match-steps", 4, "--quiet", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["step"] == 5 and [layer["layer"] for layer in report["layers"]] == [0, 1]


def test_a_full_disk_leaves_what_was_there(tmp_path, model, text):
    out = tmp_path / "a.gguf"
    checkpoint = tmp_path / "a.gguf.run" / "checkpoint.safetensors"
    assert extend(model, text, out, "--tokens", 320).returncode == 0
    before = [out.read_bytes(), checkpoint.read_bytes()]

    def fill_disk():
        limit = len(before[1]) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [LATTE, "extend", "--resume", "--out", out, "--tokens", "640", "--quiet"]
    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=fill_disk)
    assert_fails(full, "checkpoint.safetensors", "File too large")
    assert [out.read_bytes(), checkpoint.read_bytes()] == before
    fresh = [LATTE, "extend", model, "--text", text, "--out", tmp_path / "b.gguf", *SHORT, "--tokens", "320"]
    assert_fails(subprocess.run(fresh, capture_output=True, text=True, preexec_fn=fill_disk), "File too large")
    assert not (tmp_path / "b.gguf").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
    assert latte(*command[1:]).returncode == 0


@pytest.mark.parametrize(("options", "lr"), [([], 3e-4), (["--train", "lora"], 1e-3), (["--train", "lora", "--lr", "0.5"], 0.5)])
def test_low_rank_changes_have_a_rate_of_their_own(tmp_path, model, text, options, lr):
    out = tmp_path / "a.gguf"
    assert extend(model, text, out, "--tokens", 0, "--match-sequences", 0, *options).returncode == 0
    assert json.loads(latte("inspect", out, "--json").stdout)["adapter"]["recipe"]["lr"] == lr


def test_too_little_memory_is_said(tmp_path, model):
    text = tmp_path / "long.txt"
    text.write_text("A long text that goes on. " * 2000)
    out = tmp_path / "a.gguf"

    def little_memory():
        resource.setrlimit(resource.RLIMIT_DATA, (600 << 20, 600 << 20))

    command = [LATTE, "extend", model, "--text", text, "--out", out, *SHORT, "--threads", "1"]
    command += ["--match-sequences", "0", "--context", "2048", "--batch", "256", "--tokens", "1048576"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=little_memory)
    assert_fails(result, "out of memory", "MB could be had")
    little = os.environ | {"LATTE_MEMORY_LIMIT": "300"}
    result = subprocess.run([*command, "--overwrite"], capture_output=True, text=True, env=little)
    assert_fails(result, "out of memory", "300 MB could be had")
    for limit, code in (("none", 0), ("9000000", 0), ("300 MB", 2)):
        asked = os.environ | {"LATTE_MEMORY_LIMIT": limit}
        result = subprocess.run([LATTE, "eval", "--help"], capture_output=True, text=True, env=asked)
        assert result.returncode == code, result.stderr
    assert_fails(result, "LATTE_MEMORY_LIMIT", "expected megabytes, or none", code=2)
    # What was done before, matching, is saved whole.
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "a.gguf.run", "base.gguf", "long.txt"}
    assert latte("eval", model, "--adapter", out, "--text", text, "--lengths", 64, "--attention", "macchiato").returncode == 0


def test_errors_leave_nothing(tmp_path, model, text):
    out = tmp_path / "a.gguf"
    short = tmp_path / "short.txt"
    short.write_text("short")
    assert_fails(extend(model, short, out), "none has 65 tokens", "short.txt has 5")
    assert_fails(extend(model, tmp_path / "none.txt", out), "none.txt")
    assert_fails(extend(text, text, out), "text.txt")
    assert_fails(extend(model, text, out, "--latents", 0), "latents is 0", code=2)
    assert_fails(extend(model, text, out, "--attention", "sparse"), "--attention", code=2)
    assert_fails(latte("extend", "--resume", "--out", out), "a.gguf.run")
    config = tmp_path / "config.json"
    for written, *said in (
        ("[1]", "expected a JSON object"),
        ('{"window": ' + "[" * 200000 + "]" * 200000 + "}", "nested deeper"),
        ('{"window": 8, "window": 16}', "window", "twice"),
        ('{"far_limit": [[8]]}', "far_limit is an array of 1, expected an integer"),
    ):
        config.write_text(written)
        result = extend(model, text, out, "--config", config)
        assert result.returncode in (1, 2)
        assert_fails(result, *said, code=result.returncode)
    assert not out.exists()
    assert_fails(latte("eval", model, "--text", short), "5 tokens, expected a stretch of 2048")
    assert_fails(latte("eval", model, "--text", text, "--attention", "macchiato"), "macchiato needs --adapter", code=2)


def test_eval_checks_everything_first(tmp_path, model, text):
    adapter, none = tmp_path / "a.gguf", tmp_path / "none.gguf"
    assert extend(model, text, adapter, "--tokens", 0, "--match-sequences", 0).returncode == 0
    asked = ["eval", model, "--text", text, "--lengths", 64]
    tasks = ["--tasks", "recall", "--task-lengths", 100, "--pairs", 64]
    for options, code, *said in (
        (["--adapter", none], 1, "none.gguf"),
        (["--control", adapter], 2, "a.gguf has latents"),
        (["--plot", tmp_path / "none" / "curve"], 1, "none/curve"),
        (tasks, 2, "a task's length is 100", "64 pairs"),
    ):
        result = latte(*asked, *options)
        assert_fails(result, *said, code=code)
        assert not result.stdout
    # The longest of all texts that are read decides how far positions are stretched.
    both = latte(*asked, "--tasks", "text,passkey", "--task-lengths", 512, "--attention", "full-ntk", "--trials", 1, "--json")
    assert json.loads(both.stdout)["rope_factor"] == 4


def test_a_recipe_is_a_configuration(tmp_path, model, text):
    first, config = tmp_path / "a.gguf", tmp_path / "recipe.json"
    assert extend(model, text, first, "--tokens", 128, "--floor", "--position", "conv").returncode == 0
    recipe = json.loads(latte("inspect", first, "--json").stdout)["adapter"]["recipe"]
    assert recipe["steps_done"] == 2
    config.write_text(json.dumps(recipe))
    # Recipes name files without their folders: the command line says where they are.
    again = tmp_path / "b.gguf"
    result = latte("extend", model, "--config", config, "--text", text, "--out", again, "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert again.read_bytes() == first.read_bytes()
    other = tmp_path / "c.gguf"
    changed = ["--floor", "--no-floor", "--forget", "--no-forget", "--latents-read-evicted", "--tokens", 0]
    result = latte("extend", model, "--config", config, "--text", text, "--out", other, *changed)
    assert result.returncode == 0, result.stderr
    recipe = json.loads(latte("inspect", other, "--json").stdout)["adapter"]["recipe"]
    assert (recipe["floor"], recipe["forget"], recipe["evicted"], recipe["position"]) == (False, False, True, "conv")


def test_an_adapter_belongs_to_its_base(tmp_path, model, text):
    adapter = tmp_path / "a.gguf"
    assert extend(model, text, adapter, "--tokens", 0, "--match-sequences", 0).returncode == 0
    other = write_model(tmp_path / "other.gguf", seed=2, name="Other")
    assert_fails(latte("eval", other, "--adapter", adapter, "--text", text, "--lengths", 64), "made for", "Tiny", "other.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(adapter.read_bytes()[:-100])
    assert_fails(latte("eval", model, "--adapter", damaged, "--text", text, "--lengths", 64), "damaged.gguf")
