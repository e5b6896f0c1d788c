"""scripts/recall_texts.py: documents whose passages come again."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "recall_texts.py"
LEAST_DISTANCE = 700


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def write_paragraphs(path: Path) -> Path:
    lines = [
        f"Paragraph {i} says that {i * 7919 % 1000} things were seen, " + "and more of them, " * (4 + i % 9) for i in range(400)
    ]
    path.write_text("too short\n" + "\n".join(lines) + "\n" + "x" * 1000 + "\n", encoding="utf-8")
    return path


def make(tmp_path: Path, name: str, seed: int) -> str:
    out = tmp_path / name
    result = run("--text", write_paragraphs(tmp_path / "text.txt"), "--megabytes", 0.2, "--seed", seed, "--out", out)
    assert result.returncode == 0, result.stderr
    return out.read_text(encoding="utf-8")


def test_lines_come_again_and_never_soon(tmp_path):
    text = make(tmp_path, "recall.txt", 1)
    assert len(text) >= 200_000
    documents = text.rstrip("\n").split("\n\n")
    assert len(documents) > 10
    seen_again = 0
    sizes = set()
    for document in documents:
        begins = defaultdict(list)
        at = 0
        for line in document.split("\n"):
            assert len(line) <= 700
            begins[line].append(at)
            at += len(line) + 1
        records = {line: where for line, where in begins.items() if not line.startswith("Paragraph")}
        sizes.add(len(records))
        for where in records.values():
            assert all(after - before >= LEAST_DISTANCE for before, after in zip(where, where[1:], strict=False))
            seen_again += len(where) - 1
    assert seen_again > len(documents)
    assert min(sizes) <= 2 and max(sizes) >= 6  # few among much else, and many


def test_seed_decides(tmp_path):
    first = make(tmp_path, "a.txt", 3)
    assert make(tmp_path, "b.txt", 3) == first
    assert make(tmp_path, "c.txt", 4) != first
    assert not list(tmp_path.glob("*.part"))


def test_what_cannot_be_done_is_said(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a line\n", encoding="utf-8")
    out = tmp_path / "out.txt"
    for arguments, message in [
        (("--text", short, "--out", out), "no line of 80 to 700 characters"),
        (("--text", tmp_path / "missing.txt", "--out", out), "missing.txt"),
    ]:
        result = run(*arguments)
        assert result.returncode == 1
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert run("--text", short, "--megabytes", 0, "--out", out).returncode == 2
    assert not out.exists()


def test_few_records_and_nothing_else_comes_again(tmp_path):
    out = tmp_path / "few.txt"
    few = ("--most-items", 3, "--records", 1, "--megabytes", 0.2)
    result = run("--text", write_paragraphs(tmp_path / "text.txt"), *few, "--out", out)
    assert result.returncode == 0, result.stderr
    for document in out.read_text(encoding="utf-8").rstrip("\n").split("\n\n"):
        records = {line for line in document.split("\n") if not line.startswith("Paragraph")}
        assert 1 <= len(records) <= 3
    sentences = run("--text", tmp_path / "text.txt", *few, "--sentences", 1, "--out", out)
    assert sentences.returncode == 0, sentences.stderr
    known = set((tmp_path / "text.txt").read_text(encoding="utf-8").split("\n"))
    changed = {line for line in out.read_text(encoding="utf-8").split("\n") if line not in known}
    assert len(changed) > 20  # sentences, each with a number in a word's place
    assert all(any(word.isdigit() for word in line.split()) for line in changed)
    assert "--sentences -1" in run("--text", out, "--sentences", -1, "--out", out).stderr
    assert "--records 2" in run("--text", out, "--records", 2, "--out", out).stderr
    assert "--most-items 0" in run("--text", out, "--most-items", 0, "--out", out).stderr
