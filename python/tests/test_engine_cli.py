"""Commands of the inference engine, as a user runs them on GGUF files and on models of latte train."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_cli import BUILD, LATTE, SHORT, assert_fails, latte
from test_extend import write_model

pytestmark = pytest.mark.skipif(not (LATTE.exists() and (BUILD / "latte-torch").exists()), reason="the programs aren't built")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf")


def generate(model: Path, *options, tokens: int = 20) -> dict:
    result = latte("generate", model, "--tokens", tokens, "--temperature", 0, "--json", *options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def trained(folder: Path, content: str) -> Path:
    text = folder / "text.txt"
    text.write_text(content)
    result = latte("train", "--text", text, "--out", folder / "run", *SHORT)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_a_shortened_file_is_explained(tmp_path):
    run = trained(tmp_path, "To be, or not to be: that is the question.\n" * 40)
    process = subprocess.Popen(
        [LATTE, "generate", run, "--tokens", "100000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(100)
    os.truncate(run / "checkpoint.safetensors", 0)
    errors = process.communicate()[1]
    assert process.returncode == 1
    assert errors.startswith("latte: error: a file became shorter")


def test_a_text_begins_with_what_the_vocabulary_has(tmp_path, model):
    (tmp_path / "letters").mkdir()
    (tmp_path / "words").mkdir()
    letters, words = trained(tmp_path / "letters", "abcdefgh" * 200), trained(tmp_path / "words", "ab cd efg " * 200)
    assert_fails(latte("generate", letters, "--tokens", 5), "--prompt")
    assert len(generate(letters, "--prompt", "a", tokens=5)["text"]) == 5
    assert generate(words, tokens=5)["text"] == generate(words, "--prompt", " ", tokens=5)["text"]
    assert generate(model, tokens=5)["text"] == generate(model, "--prompt", "\n", tokens=5)["text"]


def test_logprobs_are_those_of_the_tokens(model):
    report = generate(model, "--prompt", "abc", "--logprobs")
    assert "".join(entry["text"] for entry in report["logprobs"]) == report["text"]
    assert len(report["logprobs"]) == report["tokens"] and all(entry["logprob"] <= 0 for entry in report["logprobs"])
    plain = latte("generate", model, "--tokens", 20, "--temperature", 0, "--prompt", "abc", "--logprobs")
    assert plain.stdout == report["text"] + "\n"
    rows = [line.split() for line in plain.stderr.splitlines()]
    assert [int(row[0]) for row in rows] == [entry["token"] for entry in report["logprobs"]]


def test_penalties_count_the_prompt(model):
    first = generate(model, "--prompt", "abc", tokens=1)["text"]
    again = generate(model, "--prompt", first + "abc", "--presence-penalty", 10, "--frequency-penalty", 10, tokens=20)
    # A token that costs so much a time isn't written before all others were.
    assert len(set(again["text"])) >= 18 and not set(again["text"]) & set(first + "abc")


def test_stop_strings_end_the_text(model):
    whole = generate(model, "--prompt", "abc")["text"]
    stop = whole[6:9]
    report = generate(model, "--prompt", "abc", "--stop", "never in it", "--stop", stop)
    assert report["text"] == whole[: whole.index(stop)] and report["finish_reason"] == "stop"


def test_grammars_and_schemas_hold(tmp_path, model):
    grammar = tmp_path / "grammar.gbnf"
    grammar.write_text('root ::= "yes" | "no"')
    assert generate(model, "--prompt", "abc", "--grammar", grammar)["text"] in ("yes", "no")
    schema = {"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "required": ["a"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for given in (json.dumps(schema), tmp_path / "schema.json"):
        report = generate(model, "--prompt", "abc", "--json-schema", given, tokens=400)
        assert report["finish_reason"] != "end" or json.loads(report["text"])["a"] in (1, "b")
    grammar.write_text("yes")
    assert_fails(latte("generate", model, "--grammar", grammar), "GBNF")
    assert_fails(latte("generate", model, "--json-schema", '{"type": 3}'), "type")
    assert_fails(latte("generate", model, "--json-schema", "{}", "--grammar", grammar), "excludes", code=2)


def test_types_are_made_while_loading_or_beforehand(tmp_path, model):
    quantised = tmp_path / "q8.gguf"
    assert latte("quantize", model, quantised, "--type", "Q8_0").returncode == 0
    options = ["--prompt", "abc", "--logprobs"]
    at_once, before, plain = generate(model, "--type", "q8_0", *options), generate(quantised, *options), generate(model, *options)
    assert at_once["logprobs"][0]["logprob"] != plain["logprobs"][0]["logprob"]
    assert at_once["text"][:3] == before["text"][:3]
    assert_fails(latte("generate", model, "--type", "q9"), "q8_0", code=2)
    assert_fails(latte("quantize", model, quantised, "--type", "q9"), "q8_0", code=2)
    content = model.read_bytes()
    (tmp_path / "link.gguf").symlink_to(model)
    for itself in (model, tmp_path / "link.gguf"):
        assert_fails(latte("quantize", model, itself), "the model itself")
    assert model.read_bytes() == content


def test_options_that_exclude_each_other_and_places_that_do_not_exist(tmp_path, model):
    assert_fails(latte("generate", model, "--window", 4, "--adapter", model), "excludes", code=2)
    assert_fails(latte("generate", model, "--sinks", 4), "--window", code=2)
    nowhere = tmp_path / "nowhere" / "file"
    result = latte("generate", model, "--prompt", "a", "--save", nowhere)
    assert_fails(result, str(nowhere))
    assert result.stdout == ""  # before the text, not behind it
    result = latte("bench", "decode", "--model", model, "--plot", nowhere)
    assert_fails(result, str(nowhere))
    assert result.stdout == ""
    result = latte("bench", "decode", "--model", nowhere)
    assert_fails(result, str(nowhere))
    assert result.stdout == ""


def test_perplexity_is_that_of_eval(tmp_path, model):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i * i % 97} of a text with {i % 7}\n" for i in range(60)))
    options = ["--text", text, "--lengths", "32,100", "--windows", 3, "--json"]
    ours = json.loads(latte("perplexity", model, *options).stdout)["rows"]
    eval_options = ["--attention", "full", "--no-kl", "--dtype", "float32"]
    theirs = json.loads(latte("eval", model, *options, *eval_options).stdout)["rows"]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine["attention"], mine["length"], mine["windows"]) == (other["attention"], other["length"], other["windows"])
        for figure in ("perplexity", "stderr"):
            # The engine keeps keys and values in float16.
            assert mine[figure] == pytest.approx(other[figure], rel=2**-9)
    assert_fails(latte("perplexity", model, "--text", text, "--lengths", 100000), "--lengths")
    one = ["perplexity", model, "--text", text, "--lengths", 32, "--windows", 1]
    assert json.loads(latte(*one, "--json").stdout)["rows"][0]["stderr"] is None
    shown = latte(*one).stdout
    assert "1 stretch of 32 tokens: perplexity" in shown and "±" not in shown


def test_bench_decode_rows(tmp_path, model):
    bench = ["bench", "decode", "--model", model, "--tokens", 2, "--prompt", 4, "--threads", 1, "--seconds", 60]
    result = latte(*bench, "--depths", "8,0,8", "--types", "F32,q8_0", "--json", "--plot", tmp_path / "plot")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [(row["engine"], row["attention"], row["type"], row["depth"]) for row in rows] == [
        (engine, attention, kind, depth)
        for kind in ("F32", "Q8_0")
        for depth in (0, 8)
        for engine, attention in (("latte", "macchiato"), ("latte", "full"), ("llama.cpp", "full"))
    ]
    assert all(row["prefill_tokens_per_second"] > 0 < row["decode_tokens_per_second"] for row in rows)
    result = latte(*bench, "--engines", "latte", "--attention", "macchiato", "--depths", "1000,5000", "--window", 16, "--json")
    near, deep = json.loads(result.stdout)["rows"]
    assert deep["prefill_over_first_depth"] > 0 < deep["decode_over_first_depth"] and "decode_over_first_depth" not in near
    assert len(deep["reading_rates"]) == 1 and near["state_mb"] == deep["state_mb"]
    for option, value in (("--depths", "abc"), ("--depths", -5), ("--types", "Q9"), ("--engines", "llama"), ("--seconds", -1)):
        assert_fails(latte(*bench, option, value), option, code=2)


def test_an_interrupted_measurement_leaves_no_files(tmp_path, model):
    bench = ["bench", "decode", "--model", model, "--types", "Q8_0", "--engines", "latte", "--prompt", 16, "--tokens", 60000]
    process = subprocess.Popen([LATTE, *map(str, bench)], env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE)
    while not list(tmp_path.glob("latte-bench-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert not list(tmp_path.glob("*latte-bench*"))


def test_a_table_of_speeds(model):
    result = latte("bench", "decode", "--model", model, "--tokens", 2, "--prompt", 4, "--engines", "latte", "--depths", 0)
    assert re.match(r"engine +attention +type +depth", result.stdout)
    assert len(result.stdout.splitlines()) == 3
