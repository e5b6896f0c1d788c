#!/usr/bin/env python3
"""Checks that every rung of the ladder (CONTRIBUTING.md) includes only lower rungs, and only the libraries it may use.

    kernels -> formats -> ops -> nn -> models -> data -> train -> extend      (libtorch)
                       -> runtime -> server                                   (ggml)
    cli: any rung, but no one file of it may reach both branches

    scripts/check_ladder.py [FOLDER]      checks FOLDER (src beside this script unless given)
    scripts/check_ladder.py --self-test   checks this check against folders that break each rule

Exit status: 0 when all is well, 1 when a rule is broken, 2 when the folder can't be read.
"""

from __future__ import annotations

import pathlib
import re
import sys
import tempfile

TRUNK = ["kernels", "formats"]
TORCH_BRANCH = ["ops", "nn", "models", "data", "train", "extend"]
GGML_BRANCH = ["runtime", "server"]
TOP = "cli"
RUNGS = [*TRUNK, *TORCH_BRANCH, *GGML_BRANCH, TOP]
SUFFIXES = {".cc", ".h", ".cpp", ".hpp", ".inc"}

TORCH = re.compile(r"(torch|ATen|c10|caffe2)/|torch\.h$")
GGML = re.compile(r"(ggml|llama|gguf)([-_./]|$)")
GGUF_AND_VOCABULARY = re.compile(r"(ggml|gguf|llama)\.h$")

# A quoted string is kept and a comment becomes a blank, so that neither hides or fakes an include. A raw string counts
# as text too.
TEXT = re.compile(
    r'R"([^()\\\s]{0,16})\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//(?:\\\n|[^\n])*|/\*.*?\*/', re.DOTALL
)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*(?:include|include_next|import)[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


def lower_rungs(rung: str) -> set[str]:
    """The rungs that `rung` may include, itself among them."""
    if rung == TOP:
        return set(RUNGS)
    for branch in (TORCH_BRANCH, GGML_BRANCH):
        if rung in branch:
            return {*TRUNK, *branch[: branch.index(rung) + 1]}
    return set(TRUNK[: TRUNK.index(rung) + 1])


def barred_libraries(rung: str) -> list[tuple[str, re.Pattern[str], re.Pattern[str] | None]]:
    """(name, headers, exceptions) of the libraries that `rung` may not include."""
    torch = ("libtorch", TORCH, None)
    ggml = ("ggml", GGML, None)
    if rung == "kernels":
        return [torch, ggml]
    if rung == "formats":
        return [torch, ("ggml beyond gguf.h and libllama's vocabulary", GGML, GGUF_AND_VOCABULARY)]
    if rung in TORCH_BRANCH:
        return [ggml]
    if rung in GGML_BRANCH:
        return [torch]
    return []


def without_comments(source: str) -> str:
    def replace(match: re.Match[str]) -> str:
        text = match.group()
        if text.startswith(("//", "/*")):
            return " " + "\n" * text.count("\n")
        if text.startswith("R"):
            return '""' + "\n" * text.count("\n")
        return text

    return TEXT.sub(replace, source)


def includes_of(path: pathlib.Path) -> list[tuple[int, str]]:
    """(line, header) of every include of a file."""
    # A line that is continued with a backslash is one line to the compiler, and its number that of the first.
    source = without_comments(path.read_text(encoding="utf-8", errors="replace")).replace("\\\n", "  ")
    return [(source.count("\n", 0, match.start()) + 1, match.group(1) or match.group(2)) for match in INCLUDE.finditer(source)]


def resolve(root: pathlib.Path, path: pathlib.Path, header: str) -> pathlib.Path | None:
    """The file of the project that `header` names in `path`, relative to `root`, or None where it is a library's."""
    for folder in (path.parent, root, root.parent):
        candidate = (folder / header).resolve()
        if candidate.is_relative_to(root) and candidate.is_file():
            return candidate.relative_to(root)
    # A header that is yet to be generated, or misspelt, still belongs to the rung that it names.
    parts = pathlib.PurePosixPath(header).parts
    while parts and parts[0] in ("src", "latte", "..", "."):
        parts = parts[1:]
    return pathlib.Path(*parts) if len(parts) > 1 and parts[0] in RUNGS else None


def check(root: pathlib.Path) -> list[str]:
    """Every broken rule below `root`, one line each."""
    root = root.resolve()
    broken: list[str] = []
    reaches: dict[pathlib.Path, list[tuple[int, str, pathlib.Path | None]]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix not in SUFFIXES or not path.is_file():
            continue
        name = path.relative_to(root)
        rung = name.parts[0]
        if len(name.parts) < 2 or rung not in RUNGS:
            broken.append(f"{name}: lies on no rung of the ladder ({', '.join(RUNGS)})")
            continue
        reaches[name] = [(line, header, resolve(root, path, header)) for line, header in includes_of(path)]
        for line, header, target in reaches[name]:
            if target is not None:
                if target.parts[0] not in lower_rungs(rung):
                    broken.append(f"{name}:{line}: {rung} may not include {target.parts[0]} ({header})")
                continue
            for library, headers, exceptions in barred_libraries(rung):
                if headers.match(header) and not (exceptions and exceptions.match(header)):
                    broken.append(f"{name}:{line}: {rung} may not include {library} ({header})")
    broken += [
        f"{name}: reaches both the libtorch branch and the ggml branch"
        for name in sorted(reaches)
        if joins_branches(name, reaches)
    ]
    return broken


def joins_branches(name: pathlib.Path, reaches: dict[pathlib.Path, list[tuple[int, str, pathlib.Path | None]]]) -> bool:
    """Whether a file of the top rung sees, through any chain of includes, both branches or their libraries."""
    if name.parts[0] != TOP:
        return False
    torch = ggml = False
    seen, waiting = {name}, [name]
    while waiting:
        current = waiting.pop()
        rung = current.parts[0]
        torch = torch or rung in TORCH_BRANCH
        ggml = ggml or rung in GGML_BRANCH
        for _, header, target in reaches.get(current, []):
            if target is None:
                torch = torch or bool(TORCH.match(header))
                ggml = ggml or (rung == TOP and bool(GGML.match(header)))
            elif target not in seen:
                seen.add(target)
                waiting.append(target)
    return torch and ggml


# Each case: files, and a piece of every complaint that they must draw; none where they are sound.
CASES: list[tuple[str, dict[str, str], list[str]]] = [
    (
        "a sound tree",
        {
            "kernels/latent.h": "#pragma once\n#include <cstdint>\n",
            "kernels/latent.cc": '#include "kernels/latent.h"\n#include "hwy/highway.h"\n// #include <torch/torch.h>\n',
            "formats/gguf.cc": '#include <gguf.h>\n#include <llama.h>\n/*\n#include "ops/ops.h"\n*/\n',
            "ops/ops.h": '#include <torch/torch.h>\n#include "kernels/latent.h"\n',
            "train/loop.cc": '#include "ops/ops.h"\n#include "formats/file.h"\nauto text = "/*";\n#include "data/corpus.h"\n',
            "runtime/engine.cc": '#include <ggml.h>\n#include "kernels/latent.h"\n',
            "server/server.cc": '#include "runtime/engine.h"\n',
            "cli/torch_main.cc": '#include "train/loop.h"\n',
            "cli/latte_main.cc": '#include "server/server.h"\n',
        },
        [],
    ),
    ("a kernel that knows an operator", {"kernels/a.cc": '#include "ops/ops.h"\n'}, ["a.cc:1: kernels may not include ops"]),
    ("a kernel that knows torch", {"kernels/a.cc": "\n#include <ATen/ATen.h>\n"}, ["a.cc:2: kernels may not include libtorch"]),
    ("a kernel that knows c10", {"kernels/a.h": "# include <c10/util/Half.h>\n"}, ["kernels may not include libtorch"]),
    ("a kernel that knows ggml", {"kernels/a.h": '#include "ggml-cpu.h"\n'}, ["kernels may not include ggml"]),
    ("a kernel that knows llama", {"kernels/a.h": "#include <llama.h>\n"}, ["kernels may not include ggml"]),
    ("a format that knows torch", {"formats/a.cc": "#include <torch/torch.h>\n"}, ["formats may not include libtorch"]),
    ("a format that computes with ggml", {"formats/a.cc": "#include <ggml-cpu.h>\n"}, ["formats may not include ggml beyond"]),
    ("a rung that looks up", {"nn/a.cc": '#include "models/language_model.h"\n'}, ["nn may not include models"]),
    ("a relative path", {"ops/a.cc": '#include "../train/loop.h"\n', "train/loop.h": ""}, ["ops may not include train"]),
    ("a path from above src", {"ops/a.cc": '#include "src/nn/latte.h"\n'}, ["ops may not include nn"]),
    ("angle brackets", {"ops/a.cc": "#include <nn/latte.h>\n"}, ["ops may not include nn"]),
    ("a comment before the include", {"ops/a.cc": '/* why */ #include "nn/a.h"\n'}, ["ops may not include nn"]),
    ("a continued line", {"ops/a.cc": '#include \\\n  "nn/a.h"\n'}, ["a.cc:1: ops may not include nn"]),
    (
        "text that looks like a comment",
        {"ops/a.cc": 'auto a = "/*";\n#include "nn/a.h"\nauto b = "*/";\n'},
        ["a.cc:2: ops may not"],
    ),
    ("the runtime and torch", {"runtime/a.cc": "#include <torch/script.h>\n"}, ["runtime may not include libtorch"]),
    ("the runtime and an operator", {"runtime/a.cc": '#include "ops/ops.h"\n'}, ["runtime may not include ops"]),
    ("the trainer and the runtime", {"train/a.cc": '#include "runtime/engine.h"\n'}, ["train may not include runtime"]),
    ("the trainer and ggml", {"extend/a.cc": "#include <gguf.h>\n"}, ["extend may not include ggml"]),
    ("a program of both branches", {"cli/a.cc": '#include "ops/ops.h"\n#include "runtime/e.h"\n'}, ["cli/a.cc: reaches both"]),
    (
        "a program of both branches, by way of headers",
        {"cli/a.cc": '#include "cli/b.h"\n#include <ggml.h>\n', "cli/b.h": '#include "c.h"\n', "cli/c.h": '#include "nn/a.h"\n'},
        ["cli/a.cc: reaches both"],
    ),
    ("a folder off the ladder", {"utils/a.cc": ""}, ["utils/a.cc: lies on no rung"]),
    ("a file beside the rungs", {"a.h": ""}, ["a.h: lies on no rung"]),
]


def self_test() -> int:
    failures = 0
    for title, files, expected in CASES:
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder, "src")
            for name, content in files.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
            found = check(root)
        if len(found) != len(expected) or not all(piece in line for piece, line in zip(expected, found, strict=True)):
            failures += 1
            print(f"self-test failed: {title}\n  expected {expected}\n  found    {found}", file=sys.stderr)
    print(f"ladder self-test: {len(CASES) - failures} of {len(CASES)} cases as expected")
    return 1 if failures else 0


def main(arguments: list[str]) -> int:
    if arguments == ["--self-test"]:
        return self_test()
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    root = pathlib.Path(arguments[0]) if arguments else pathlib.Path(__file__).resolve().parent.parent / "src"
    if not root.is_dir():
        print(f"check_ladder: {root} is no folder", file=sys.stderr)
        return 2
    broken = check(root)
    for line in broken:
        print(f"src/{line}", file=sys.stderr)
    print(f"ladder: {len(broken)} broken rules" if broken else "ladder: sound")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
