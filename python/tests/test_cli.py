"""The programs latte and latte-torch, as a user runs them: training, interruption, damage, full disks, generation."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

BUILD = Path(os.environ.get("LATTE_BUILD_DIR", Path(__file__).parents[2] / "build"))
LATTE = BUILD / "latte"

pytestmark = pytest.mark.skipif(not (LATTE.exists() and (BUILD / "latte-torch").exists()), reason="the programs aren't built")

TINY = ["--layers", "1", "--embed-dim", "16", "--heads", "2", "--context", "16", "--batch", "2", "--eval-batches", "1"]
SHORT = [*TINY, "--steps", "6", "--warmup", "2", "--eval-every", "3", "--save-every", "3", "--threads", "1"]
# More steps than anyone waits for: a run to be interrupted.
ENDLESS = [*TINY, "--steps", "100000000", "--eval-every", "0", "--threads", "1"]


def latte(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([LATTE, *map(str, arguments)], capture_output=True, text=True, **options)


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen([LATTE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_fails(result: subprocess.CompletedProcess, *parts: str, code: int = 1) -> None:
    """One line on standard error that says what is wrong."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert lines and lines[-1].startswith("latte: error: "), result.stderr
    assert sum(line.startswith("latte: error: ") for line in lines) == 1
    for part in parts:
        assert part in lines[-1]


def lines_of(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture
def run(tmp_path: Path, text: Path) -> Path:
    """A finished run."""
    folder = tmp_path / "run"
    result = latte("train", "--text", text, "--out", folder, *SHORT)
    assert result.returncode == 0, result.stderr
    return folder


def test_help_and_version_need_no_libtorch():
    assert "train" in latte("--help").stdout
    assert latte("--version").stdout.startswith("latte ")
    assert latte().returncode == 2
    unknown = latte("trian")
    assert_fails(unknown, "trian", "train", code=2)
    needed = subprocess.run(["ldd", LATTE], capture_output=True, text=True).stdout
    assert "libtorch" not in needed


def test_latte_says_where_latte_torch_is_missing(tmp_path):
    alone = shutil.copy(LATTE, tmp_path / "latte")
    assert_fails(subprocess.run([alone, "train"], capture_output=True, text=True), "LATTE_TORCH=ON")


@pytest.mark.parametrize("command", ["train", "generate", "chat", "perplexity", "quantize", "verify", "bench"])
def test_every_command_explains_itself(command):
    result = latte(command, "--help")
    assert result.returncode == 0
    assert "latte " + command in result.stdout


@pytest.mark.parametrize("command", ["train", "generate", "chat", "perplexity", "quantize"])
def test_help_has_examples(command):
    assert "Examples:\n  latte " + command in latte(command, "--help").stdout


def test_train_leaves_checkpoint_metrics_config_and_curve(run, text):
    metrics = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics if line["val_loss"] is not None] == [3, 6]
    assert set(metrics[0]) == {"step", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "tokens", "time"}
    assert metrics[-1]["tokens"] == 6 * 2 * 16
    names = {path.name for path in run.iterdir()} - {".lock"}
    assert names >= {"checkpoint.safetensors", "metrics.jsonl", "config.json"}
    if shutil.which("gnuplot"):
        assert "<svg" in (run / "loss.svg").read_text()
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")

    again = latte("train", "--text", text, "--config", run / "config.json", "--out", run.parent / "again", "--threads", 1)
    assert again.returncode == 0, again.stderr
    losses = [[line["loss"] for line in lines_of(folder / "metrics.jsonl")] for folder in (run, run.parent / "again")]
    assert losses[0] == losses[1]


def test_train_without_gnuplot_goes_on_without_a_curve(tmp_path, text):
    result = latte("train", "--text", text, "--out", tmp_path / "run", *SHORT, env={**os.environ, "PATH": "/nonexistent"})
    assert result.returncode == 0, result.stderr
    assert "gnuplot isn't installed" in result.stderr
    assert not (tmp_path / "run" / "loss.svg").exists()


def test_a_progress_line_tells_step_loss_rate_and_time_left(tmp_path, text):
    result = latte("train", "--text", text, "--out", tmp_path / "run", *SHORT)
    assert result.returncode == 0, result.stderr
    lines = re.findall(r"step +(\d+)/6 .*loss \d+\.\d+.* tokens/s(.*)", result.stderr)
    assert lines and lines[-1][0] == "6" and re.fullmatch(r"  took .+", lines[-1][1]), result.stderr
    # The first line knows nothing of time yet.
    process, line = start("train", "--text", text, "--out", tmp_path / "long", *SHORT, "--steps", 100000000), ""
    stop = threading.Timer(60, process.kill)
    stop.start()
    for line in process.stderr:
        if " left" in line:
            break
    process.kill()
    process.communicate()
    stop.cancel()
    assert re.search(r"step +\d+/100000000 .*loss \d+\.\d+.* \d+ tokens/s  .+ left$", line)


def test_json_report(tmp_path, text):
    result = latte("train", "--text", text, "--out", tmp_path / "run", *SHORT, "--json", "--quiet")
    report = json.loads(result.stdout)
    assert report["step"] == 6 and report["val_loss"] > 0 and not report["interrupted"]
    assert result.stderr == ""


def test_refuses_a_folder_with_a_run_unless_told(run, text):
    before = (run / "checkpoint.safetensors").read_bytes()
    assert_fails(latte("train", "--text", text, "--out", run, *SHORT), "--resume", "--overwrite", code=2)
    # A mistake must not cost the old run, --overwrite or not.
    assert_fails(latte("train", "--text", run / "none", "--out", run, *SHORT, "--overwrite"), "No such file")
    assert (run / "checkpoint.safetensors").read_bytes() == before
    assert latte("train", "--text", text, "--out", run, *SHORT, "--overwrite").returncode == 0


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint: weights, moments, the generator."""
    with safe_open(folder / "checkpoint.safetensors", framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_resumes_bit_for_bit(tmp_path, text, number):
    """Straight through, and in two programs with dropout: the same bytes."""
    options = [*TINY, "--steps", "1000", "--dropout", "0.2", "--accumulate", "2", "--threads", "1", "--eval-every", "7"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert latte("train", "--text", text, "--out", whole, *options).returncode == 0

    process = start("train", "--text", text, "--out", parts, *options, "--save-every", "0")
    metrics = parts / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 5, process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    done = len(lines_of(metrics))
    assert 5 <= done < 1000
    assert f"saved at step {done}" in errors

    # What isn't named is as it was.
    result = latte("train", "--out", parts, "--resume", "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert weights(whole) == weights(parts)
    for key in ("step", "loss", "val_loss", "lr", "grad_norm", "tokens"):
        assert [line[key] for line in lines_of(metrics)] == [line[key] for line in lines_of(whole / "metrics.jsonl")]


def test_a_killed_run_leaves_a_whole_checkpoint(tmp_path, text):
    folder = tmp_path / "run"
    checkpoint, metrics = folder / "checkpoint.safetensors", folder / "metrics.jsonl"
    for attempt in range(5):
        resume = ["--resume"] if attempt else []
        process = start("train", "--text", text, "--out", folder, *ENDLESS, "--save-every", "1", *resume)
        before = checkpoint.stat().st_mtime_ns if attempt else 0
        wait_for(lambda old=before: checkpoint.exists() and checkpoint.stat().st_mtime_ns != old, process)
        time.sleep(0.003 * attempt)
        process.kill()
        process.communicate()
        result = latte("generate", folder, "--tokens", 1)
        assert result.returncode == 0, result.stderr
        with safe_open(checkpoint, framework="np") as file:
            step = int(file.metadata()["step"])
        assert step <= (metrics.read_bytes().count(b"\n") if metrics.exists() else 0)


def test_a_run_killed_before_its_first_save_resumes_from_its_start(tmp_path, text):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert latte("train", "--text", text, "--out", whole, *SHORT).returncode == 0
    process = start("train", "--text", text, "--out", parts, *ENDLESS, "--warmup", 2, "--save-every", "0")
    metrics = parts / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3, process)
    process.kill()
    process.communicate()
    result = latte("train", "--out", parts, "--resume", "--steps", 6, "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert weights(parts) == weights(whole)
    assert [line["step"] for line in lines_of(metrics)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("attention", ["softmax", "window"])
@pytest.mark.parametrize("position", ["vapor", "conv", "rg_lru"])
def test_every_position_is_trained_resumed_and_written_with(tmp_path, text, attention, position):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--attention", attention, "--position", position, "--window", 4, "--lr", 1e-2, "--min-lr", 1e-2]
    assert latte("train", "--text", text, "--out", whole, *SHORT, *options).returncode == 0
    assert latte("train", "--text", text, "--out", parts, *SHORT, *options, "--steps", 3).returncode == 0
    result = latte("train", "--out", parts, "--resume", "--steps", 6, "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert weights(whole) == weights(parts)
    first, last = lines_of(whole / "metrics.jsonl")[:: len(lines_of(whole / "metrics.jsonl")) - 1]
    assert last["loss"] < first["loss"]
    result = latte("generate", whole, "--prompt", "the", "--tokens", 40, "--temperature", 0, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tokens"] == 40


def test_two_runs_do_not_share_a_folder(tmp_path, text):
    folder = tmp_path / "run"
    process = start("train", "--text", text, "--out", folder, *ENDLESS, "--save-every", "1")
    wait_for((folder / "checkpoint.safetensors").exists, process)
    assert_fails(latte("train", "--out", folder, "--resume"), "another process")
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("content", "part"),
    [(None, "No such file"), (b"", "empty"), (b"ab", "too short"), (b"abc \xff def" * 100, "UTF-8")],
    ids=["missing", "empty", "short", "not-utf8"],
)
def test_bad_texts(tmp_path, content, part):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert_fails(latte("train", "--text", path, "--out", tmp_path / "run", *SHORT), "bad.txt", part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["train", "--text"], ["generate"], ["verify"]])
def test_a_pipe_is_refused_at_once(tmp_path, command):
    os.mkfifo(tmp_path / "pipe")
    assert_fails(latte(*command, tmp_path / "pipe", timeout=60), "regular file", code=2 if command == ["verify"] else 1)


def test_a_folder_is_no_text(tmp_path):
    assert_fails(latte("train", "--text", tmp_path, *SHORT), "Is a directory")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--lr", "-1"], "lr"),
        (["--steps", "0"], "steps"),
        (["--steps", "many"], "steps"),
        (["--heads", "3"], "num_heads"),
        (["--attention", "latte", "--position", "rotary"], "position"),
        (["--attention", "cubic"], "attention"),
        (["--batch", "99999999999"], "batch"),
        (["--resume", "--overwrite"], "overwrite"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_options_are_usage_errors(tmp_path, text, options, part):
    assert_fails(latte("train", "--text", text, "--out", tmp_path / "run", *SHORT, *options), part, code=2)
    assert not (tmp_path / "run").exists()


def test_bad_config_files(tmp_path, text):
    config = tmp_path / "config.json"
    for content, part, code in [
        ("{", "JSON", 1),
        ('{"mode": {}}', "mode", 1),
        ('{"training": {"stepz": 1}}', "stepz", 2),
        ('{"model": {"embed_dim": "big"}}', "embed_dim", 2),
    ]:
        config.write_text(content)
        assert_fails(latte("train", "--text", text, "--config", config, "--out", tmp_path / "run"), part, code=code)


def test_resume_refuses_another_model_or_none(run):
    assert_fails(latte("train", "--out", run, "--resume", "--steps", 9, "--layers", 2), "num_layers", code=2)
    again = latte("train", "--out", run, "--resume")
    assert again.returncode == 0 and "a larger --steps goes on" in again.stderr, again.stderr
    assert_fails(latte("train", "--out", run, "--resume", "--lr", 0.5), "more steps", code=2)
    assert_fails(latte("train", "--out", run / "none", "--resume"), "No such file")
    assert_fails(latte("train", "--resume"), "--out", code=2)


def test_resume_refuses_a_text_with_other_characters(run, text):
    text.write_text("€" * 2000)
    assert_fails(latte("train", "--out", run, "--resume", "--steps", 9), "text.txt")


def test_damaged_checkpoints(run):
    checkpoint = run / "checkpoint.safetensors"
    good = checkpoint.read_bytes()
    damaged = bytearray(good)
    damaged[-20] ^= 1
    version = good.replace(b'"version":"1"', b'"version":"9"')
    assert version != good
    for content, part in [
        (good[: len(good) // 2], "checkpoint.safetensors"),
        (good[:5], "checkpoint.safetensors"),
        (b"", "checkpoint.safetensors"),
        (bytes(damaged), "damaged"),
        (version, "version"),
    ]:
        checkpoint.write_bytes(content)
        assert_fails(latte("generate", run), part)
        assert_fails(latte("train", "--out", run, "--resume", "--steps", 9), part)
        assert checkpoint.read_bytes() == content


def test_a_full_disk_leaves_the_previous_checkpoint(run, text):
    checkpoint = run / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    limit = len(before) // 2

    def fill_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    for options in (["--resume", "--steps", 9, "--threads", 1], ["--text", text, *SHORT, "--overwrite"]):
        result = latte("train", "--out", run, *options, preexec_fn=fill_disk)
        assert_fails(result, "checkpoint.safetensors", "File too large")
        assert checkpoint.read_bytes() == before
        assert not list(run.glob(".checkpoint*"))
    assert latte("train", "--out", run, "--resume", "--steps", 9, "--threads", 1).returncode == 0
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == list(range(1, 10))


def test_generate_writes_the_same_text_for_the_same_seed(run):
    first, second, other = (
        latte("generate", run, "--prompt", "To be", "--echo", "--tokens", 60, "--seed", seed).stdout for seed in (1, 1, 2)
    )
    assert first == second != other
    assert first.startswith("To be") and len(first) == 5 + 60 + 1
    greedy = [latte("generate", run, "--temperature", 0, "--tokens", 20, "--seed", seed).stdout for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_generate_by_file_prompt_and_json(run, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("be, or")
    options = ["--tokens", 40, "--seed", 3, "--top-k", 5, "--top-p", 0.9]
    plain = latte("generate", "--model", run / "checkpoint.safetensors", "--prompt-file", prompt, *options)
    report = json.loads(latte("generate", run, "--prompt-file", prompt, *options, "--json").stdout)
    assert plain.stdout == report["text"] + "\n"
    assert report["tokens"] == 40 and report["prompt_tokens"] == 6 and report["seed"] == 3


def test_generation_costs_the_same_memory_at_every_position(run):
    result = latte("generate", run, "--tokens", 1200, "--seed", 1, "--json", "--stats")
    positions = json.loads(result.stdout)["stats"]["positions"]
    assert [row["position"] for row in positions] == [100, 1000, 1201]
    assert len({row["state_mb"] for row in positions}) == 1
    table = latte("generate", run, "--tokens", 120, "--stats").stderr
    assert "ms a token" in table and "tokens/s" in table and "seed" in table


def test_a_state_is_saved_and_continued(run, tmp_path):
    state = tmp_path / "state"
    options = ["--temperature", 0, "--tokens"]
    whole = latte("generate", run, "--prompt", "To be, or", *options, 30, "--json")
    assert latte("generate", run, "--prompt", "To be", *options, 0, "--save", state).returncode == 0
    rest = latte("generate", run, "--load", state, "--prompt", ", or", *options, 30, "--json")
    assert json.loads(rest.stdout)["text"] == json.loads(whole.stdout)["text"]
    assert_fails(latte("generate", run, "--load", state), "--prompt")

    good = state.read_bytes()
    for content, part in [(good[:-40], "cut short"), (good[:20], "too short"), (b"", "too short"), (b"no state" * 20, "not a")]:
        state.write_bytes(content)
        assert_fails(latte("generate", run, "--load", state, "--prompt", "a"), part)
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    state.write_bytes(damaged)
    assert_fails(latte("generate", run, "--load", state, "--prompt", "a"), "damaged")

    # A full disk, or a limit: what was there stays.
    state.write_bytes(good)
    limit = len(good) // 2
    result = latte(
        *("generate", run, "--prompt", "a", "--tokens", 1, "--save", state),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert_fails(result, "File too large")
    assert state.read_bytes() == good


@pytest.mark.parametrize("attention", ["softmax", "window", "latte", "linear", "gated_linear"])
def test_every_attention_generates_in_the_engine(tmp_path, text, attention):
    folder = tmp_path / "run"
    assert latte("train", "--text", text, "--out", folder, *SHORT, "--attention", attention).returncode == 0
    assert json.loads(latte("generate", folder, "--tokens", 50, "--json").stdout)["tokens"] == 50
    rows = json.loads(latte("perplexity", folder, "--text", text, "--lengths", 32, "--json").stdout)["rows"]
    assert rows[0]["perplexity"] > 1


def test_bench_decode_runs_trained_models(tmp_path, text):
    folder = tmp_path / "run"
    options = ["--attention", "macchiato", "--embed-dim", 64, "--window", 8]
    assert latte("train", "--text", text, "--out", folder, *SHORT, *options).returncode == 0
    short = ["--prompt", 8, "--tokens", 4, "--threads", 1, "--depths", "0,1000", "--json"]
    for model in (folder, folder / "checkpoint.safetensors"):
        result = latte("bench", "decode", "--model", model, *short, "--types", "F32,Q8_0")
        assert result.returncode == 0, result.stderr
        rows = json.loads(result.stdout)["rows"]
        assert [(row["engine"], row["attention"], row["type"], row["depth"]) for row in rows] == [
            ("latte", "macchiato", kind, depth) for kind in ("F32", "Q8_0") for depth in (0, 1000)
        ]
        assert all(row["decode_tokens_per_second"] > 0 and row["prefill_tokens_per_second"] > 0 for row in rows)
        assert all(row["latents_trained"] for row in rows)
        assert rows[0]["state_mb"] < rows[1]["state_mb"] == rows[3]["state_mb"]  # float16 either way
    bench = ["bench", "decode", "--model", folder]
    assert "sessions (macchiato)" in latte(*bench, "--sessions", 3, "--threads", 1).stdout
    assert_fails(latte(*bench, "--engines", "llama.cpp"), "llama.cpp can't run", "--engines")
    assert_fails(latte(*bench, "--attention", "full"), "trained with", "--attention")
    assert_fails(latte(*bench, "--adapter", "x.gguf"), "--adapter", "checkpoint")
    assert_fails(latte(*bench, "--types", "Q9"), "Q9", code=2)
    assert_fails(latte("bench", "decode", "--model", tmp_path), "checkpoint.safetensors")


def test_bench_decode_ends_where_learned_positions_do(tmp_path, text):
    folder = tmp_path / "run"
    options = ["--attention", "softmax", "--position", "learned"]  # as many as the context of SHORT, 16
    assert latte("train", "--text", text, "--out", folder, *SHORT, *options).returncode == 0
    bench = ["bench", "decode", "--model", folder, "--prompt", 4, "--tokens", 2, "--threads", 1, "--json"]
    result = latte(*bench, "--depths", "0,12,13")
    assert [row["depth"] for row in json.loads(result.stdout)["rows"]] == [0, 12] and "16 learned positions" in result.stderr
    assert_fails(latte(*bench, "--depths", "13"), "16 learned positions", "--depths")


def test_generate_refuses_what_it_cannot_read(run):
    assert_fails(latte("generate", run, "--prompt", "über"), "prompt")
    assert_fails(latte("generate", run, "--prompt", ""), "prompt is empty")
    assert_fails(latte("generate", run, "--top-p", 2), "top-p", code=2)
    assert_fails(latte("generate", run, "--tokens", -1), code=2)
    assert_fails(latte("generate"), "model", code=2)
    assert_fails(latte("generate", run, "--adapter", run / "config.json"), "checkpoint")
    assert_fails(latte("chat", run), "no chat template")
    assert_fails(latte("generate", run / "metrics.jsonl"), "metrics.jsonl")


def test_generate_notices_a_full_disk(run):
    with open("/dev/full", "w") as full:
        result = subprocess.run([LATTE, "generate", run], stdout=full, stderr=subprocess.PIPE, text=True)
    assert_fails(result, "No space left")


def test_verify_runs_every_target():
    files = sorted((Path(__file__).parents[2] / "tests" / "golden").glob("*.safetensors"))
    result = latte("verify", *files, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    errors = {}
    for row in json.loads(result.stdout)["rows"]:
        errors.setdefault(row["target"], []).append(row["errors"])
    # Targets round differently (the order of sums, fused products): equal errors would mean that one of them ran twice.
    assert len({json.dumps(rows) for rows in errors.values()}) == len(errors)


GOLDEN = Path(__file__).parents[2] / "tests" / "golden"


def rewritten(source: Path, path: Path, change=lambda tensors: None, **metadata) -> Path:
    """A copy of a reference file whose tensors change(tensors) has altered."""
    with safe_open(source, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() | metadata
    change(tensors)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("name", ["y", "dx", "dwk"])
def test_verify_marks_what_exceeds_its_tolerance(tmp_path, name):
    good = GOLDEN / "causal_small.safetensors"
    row = next(r for r in json.loads(latte("verify", good, "--json").stdout)["rows"] if r["dtype"] == "float32")

    def moved_by(share):
        """The reference `name`, moved by so much of what verify allows, tol (norm + sqrt(n))."""

        def move(tensors):
            reference = tensors[name]
            allowed = row["tolerance"] * (np.linalg.norm(reference) + np.sqrt(reference.size))
            reference.flat[3] += share * allowed

        return move

    assert latte("verify", rewritten(good, tmp_path / "causal_near.safetensors", moved_by(0.5))).returncode == 0
    bad = rewritten(good, tmp_path / "causal_far.safetensors", moved_by(2))
    result = latte("verify", good, bad)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Some errors exceed" in result.stdout.splitlines()[-1]
    above, below = result.stdout.split(str(bad))
    assert "EXCEEDS" not in above
    # References hold what float32 is judged by; half precision is judged by float64 on the rounded inputs.
    for line in below.splitlines()[1:-1]:
        assert line.endswith("EXCEEDS" if " float32 " in line else "ok"), line
    report = latte("verify", bad, "--json")
    assert report.returncode == 1
    rows = json.loads(report.stdout)["rows"]
    assert {r["passed"] for r in rows if r["dtype"] == "float32"} == {False}
    assert all(r["errors"][name] > r["tolerance"] for r in rows if r["dtype"] == "float32")
    assert not json.loads(report.stdout)["passed"]


def test_verify_refuses_what_it_cannot_read(tmp_path):
    good = GOLDEN / "causal_small.safetensors"
    short = tmp_path / "short.safetensors"
    short.write_bytes(good.read_bytes()[:-1])
    lacking = rewritten(good, tmp_path / "lacking.safetensors", lambda tensors: tensors.pop("dwq"))
    heads = rewritten(good, tmp_path / "heads.safetensors", heads="0")
    for path, part in ((short, "short.safetensors"), (lacking, "dwq"), (heads, "heads"), (tmp_path / "none", "No such file")):
        assert_fails(latte("verify", good, path), part, code=2)


BENCH = ["bench", "attention", "--threads", 1, "--heads", 2, "--latents", 8, "--head-dim", 8, "--repeat-seconds", 0.001]


def bench(*options) -> dict:
    result = latte(*BENCH, *options, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_bench_attention_measures_a_row_once():
    result = bench("--tokens", "64,32,64", "--attention", "causal,causal", "--dtypes", "float32,float32")
    assert [(row["pass"], row["tokens"]) for row in result["rows"]] == [
        ("forward", 32), ("forward", 64), ("forward + backward", 32), ("forward + backward", 64)
    ]  # fmt: skip
    assert {e["attention"] for e in result["exponents"]} == {"causal", "sdpa"}
    assert all(isinstance(e["exponent"], float) and 0 < e["memory_exponent"] < 2.5 for e in result["exponents"])
    for row in result["rows"]:  # outputs at least: 2 heads of 8 floats a token
        assert min(row["peak_memory_mb"], row["sdpa_peak_memory_mb"]) * 1e6 >= row["tokens"] * 64
        assert min(row["fma_fraction"], row["bandwidth_fraction"], row["gflops"]) > 0
    assert min(result["step_microseconds_per_head"], *result["limits"].values()) > 0
    assert bench("--tokens", "32,32", "--dtypes", "float32")["exponents"] == []


def test_bench_attention_skips_the_rival_when_time_is_up():
    result = bench("--tokens", "32,64", "--total-seconds", 0.0001)
    assert len(result["rows"]) == 3 * 2 * 2 * 2
    for row in result["rows"]:
        assert row["milliseconds"] > 0
        assert row["sdpa_milliseconds"] is None and row["speedup"] is None
        assert row["sdpa_note"] == "sdpa skipped: no time left of 0.0001 s"
    assert not any(e["attention"].startswith("sdpa") for e in result["exponents"])
    assert all(row["sdpa_milliseconds"] > 0 for row in bench("--tokens", "32,64")["rows"])
    assert_fails(latte(*BENCH, "--total-seconds", 0), "--total-seconds", code=2)


def test_reports_notice_a_full_disk(run, text):
    golden = Path(__file__).parents[2] / "tests" / "golden" / "causal_small.safetensors"
    for arguments in (["verify", golden], ["train", "--out", run, "--resume", "--steps", 7, "--json"]):
        with open("/dev/full", "w") as full:
            result = subprocess.run([LATTE, *map(str, arguments)], stdout=full, stderr=subprocess.PIPE, text=True)
        assert_fails(result, "standard output")


def test_generate_ends_cleanly_on_ctrl_c(run):
    process = subprocess.Popen(
        [LATTE, "generate", run, "--tokens", "100000000", "--stats"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.read(100)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130
    assert output.endswith(b"\n") and b"ms a token" in errors


def test_learned_positions_end(tmp_path, text):
    folder = tmp_path / "run"
    options = [*SHORT, "--attention", "softmax", "--position", "learned"]
    assert latte("train", "--text", text, "--out", folder, *options).returncode == 0
    assert_fails(latte("generate", folder, "--tokens", 50), "learned positions")


def test_bytes_as_tokens(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(256)) * 20)
    folder = tmp_path / "run"
    assert latte("train", "--text", path, "--tokens", "bytes", "--out", folder, *SHORT).returncode == 0
    result = subprocess.run([LATTE, "generate", folder, "--tokens", "50", "--seed", "1"], capture_output=True)
    assert result.returncode == 0 and len(result.stdout) == 51
    assert json.loads(latte("generate", folder, "--tokens", 50, "--json").stdout)["tokens"] == 50
