"""What a window of W tokens and L latents a key-value head cost a converted model, and what they give it.

For each L a small conversion is trained (`latte extend`): matching at --match-window, then KL to the original with windows drawn
from there up to the widest of --windows, so that one adapter serves all of them; L = 0 is window and sinks alone, trained on the
same stretches. Each is read at each window (`latte eval`: perplexity of long stretches of --eval-text), and other adapters, which
--adapters names, at their own. The engine writes tokens with windows and latents of these sizes (`latte bench decode`: they cost
the same with any weights), in rounds that go through all sizes, of which the median counts. Runs that are finished are kept, so
that the program may be stopped and started again; the numbers go to OUT.json, the figure to OUT.svg and OUT.png.

Example:

    python bench/windows_and_latents.py --model smollm2.gguf --text mix/*.txt --eval-text wikitext2.valid.txt \\
        --runs runs/windows --out docs/figures/windows-and-latents
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ["#4c566a", "#a3be8c", "#d08770", "#b48ead", "#5e81ac", "#bf616a"]


def run(args, *command) -> str:
    """Standard output of latte; what it says besides goes to the terminal. Ctrl-C reaches it too: it may take a while to save."""
    full = [str(args.latte), *map(str, command), "--threads", str(args.threads)]
    with subprocess.Popen(full, stdout=subprocess.PIPE, text=True) as process:
        try:
            output = process.communicate()[0]
        except KeyboardInterrupt:
            process.communicate()
            sys.exit(130)
    if process.returncode != 0:
        sys.exit(130 if process.returncode == 130 else f"{' '.join(full[:2])} ended with exit code {process.returncode}")
    return output


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def kept(path: Path, make) -> dict:
    """The JSON of `path`, which `make()` prints where it isn't there."""
    if not path.exists():
        write(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def extend(args, name: str, *options) -> Path:
    """The adapter `name`, trained unless it is there; a run that was stopped goes on."""
    adapter, done = args.runs / f"{name}.gguf", args.runs / f"{name}.done"
    if not done.exists():
        again = ["--resume"] if (args.runs / f"{name}.gguf.run/checkpoint.safetensors").exists() else ["--overwrite"]
        run(args, "extend", args.model, "--text", *args.text, "--context", args.context, "--seed", args.seed,
            "--eval-every", 0, "--quiet", "--out", adapter, *options, *again)  # fmt: skip
        done.touch()
    return adapter


def convert(args, latents: int) -> Path:
    """A model of so many latents: matched with the narrow window, then trained with all."""
    training = ["--tokens", args.tokens, "--warmup", args.warmup, "--teacher-cache", args.runs / "cache"]
    training += ["--window", max(args.windows), "--least-window", args.match_window]
    if latents == 0:
        return extend(args, "control", "--attention", "window-sinks", *training)
    matching = ["--match-sequences", args.match_sequences, "--match-steps", args.match_steps, "--tokens", 0]
    matched = extend(args, f"matched-{latents}", "--latents", latents, "--window", args.match_window, *matching)
    return extend(args, f"latents-{latents}", "--latents", latents, "--from", matched, *training)


def read(args, name: str, *which) -> dict:
    """latte eval's row of one model on the long stretches."""
    options = ["--text", args.eval_text, "--lengths", args.length, "--windows", args.stretches, "--no-kl", "--json"]
    return kept(args.runs / f"eval-{name}.json", lambda: run(args, "eval", args.model, *which, *options))["rows"][0]


def measure(args, adapter: Path, latents: int, window: int) -> dict:
    """The perplexity of one adapter at one window."""
    converted = ["--adapter", adapter, "--attention", "macchiato"]
    control = ["--control", adapter, "--attention", "window-sinks-uptrained"]
    row = read(args, f"{latents}-{window}", *(converted if latents else control), "--window", window)
    return {"latents": latents, "window": window, "perplexity": round(row["perplexity"], 3)}


def decode(args, point: dict, turn: int) -> tuple[float, float]:
    """(milliseconds a token, megabytes of state) of the engine."""
    if "adapter" in point:
        name, kind = Path(point["adapter"]).stem, ["--attention", "macchiato", "--adapter", point["adapter"]]
    else:
        latents, window = point["latents"], point["window"]
        kind = ["--attention", "macchiato", "--latents", latents] if latents else ["--attention", "window"]
        name, kind = f"{latents}-{window}", [*kind, "--window", window]
    options = ["--depths", args.depth, "--prompt", 16, "--tokens", args.written, "--json"]
    command = ["bench", "decode", "--model", args.model, "--engines", "latte", *kind, *options]
    row = kept(args.runs / f"decode-{name}-{turn}.json", lambda: run(args, *command))["rows"][0]
    return 1e3 / row["decode_tokens_per_second"], row["state_mb"]


NAMES = ["context", "seed", "tokens", "warmup", "match_window", "match_sequences", "match_steps", "length", "stretches"]


def check_settings(args) -> None:
    """Ends the program where --runs holds what was made with other settings."""
    settings = {name: getattr(args, name) for name in [*NAMES, "depth", "written", "threads"]}
    settings |= {"windows": max(args.windows), "model": args.model.name, "eval_text": args.eval_text.name}
    settings |= {"text": sorted(path.name for path in args.text)}
    path = args.runs / "settings.json"
    if not path.exists():
        write(path, json.dumps(settings, indent=1) + "\n")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = [f"{name} {found.get(name)}, not {value}" for name, value in settings.items() if found.get(name) != value]
    if differing:
        sys.exit(f"{args.runs} was made with {'; '.join(differing)}: --runs names another folder")


def collect(args) -> dict:
    """Everything that the figure shows, and the settings it was made with."""
    full = read(args, "full", "--attention", "full")
    points = [measure(args, convert(args, latents), latents, window) for latents in args.latents for window in args.windows]
    for adapter in args.adapters:
        row = read(args, adapter.stem, "--adapter", adapter, "--attention", "macchiato")
        points.append({"adapter": str(adapter), "window": row["window"], "perplexity": round(row["perplexity"], 3)})
    times = [[decode(args, point, turn) for point in points] for turn in range(args.rounds)]
    for i, point in enumerate(points):
        point["milliseconds"] = round(statistics.median(times[turn][i][0] for turn in range(args.rounds)), 3)
        point["state_mb"] = round(times[0][i][1], 3)
    settings = {name: getattr(args, name) for name in [*NAMES, "depth", "written", "rounds", "threads"]}
    for point in points:
        if "adapter" in point:
            point["adapter"] = Path(point["adapter"]).stem
    return {"settings": settings, "original": round(full["perplexity"], 3), "points": points}


def script(results: dict, outputs: dict[str, str]) -> str:
    """The figure for gnuplot: perplexity over state and over time, a line for each number of latents, a point for each window."""
    original = results["original"]
    numbers = sorted({point["latents"] for point in results["points"] if "latents" in point})
    adapters = [
        f"{p['state_mb']} {p['milliseconds']} {p['perplexity']} {p['window']}" for p in results["points"] if "adapter" in p
    ]
    lines = ["set grid", "set ylabel 'perplexity'", f"set yrange [{0.96 * original}:]", "set key top right"]
    lines.append(f"set label 'the original: {original:.2f}' at graph 0.03, first {original} offset 0,-0.8")
    for latents in numbers:
        mine = [point for point in results["points"] if point.get("latents") == latents]
        rows = [f"{p['state_mb']} {p['milliseconds']} {p['perplexity']} {p['window']}" for p in mine]
        lines += [f"$rows{latents} << END_OF_DATA", *rows, "END_OF_DATA"]
    lines += ["$adapters << END_OF_DATA", *adapters, "END_OF_DATA"]
    panels = ["set multiplot layout 1,2"]
    for column, axis in (
        (1, "set logscale x 2; set xlabel 'state (MB)'"),
        (2, "unset logscale; set xlabel 'ms a token written'"),
    ):
        plots = [f"{original} with lines linecolor rgb '#888888' dashtype 2 notitle"]
        for i, latents in enumerate(numbers):
            title = f"{latents} latents" if latents else "window and sinks alone"
            style = f"with linespoints linewidth 2 pointtype 7 pointsize 0.7 linecolor rgb '{COLOURS[i % len(COLOURS)]}'"
            plots.append(f"$rows{latents} using {column}:3 {style} title '{title}'")
            if latents in (numbers[0], numbers[-1]):
                place = "right offset -0.5,-0.7" if latents == numbers[0] else "left offset 0.5,0.6"
                plots.append(
                    f"$rows{latents} using {column}:3:4 with labels {place} font 'sans,9' textcolor rgb '#666666' notitle"
                )
        if adapters:
            plots.append(
                f"$adapters using {column}:3 with points pointtype 9 pointsize 1.4 linecolor black title 'trained for longer'"
            )
            plots.append(f"$adapters using {column}:3:4 with labels left offset 0.7,-0.5 font 'sans,9' notitle")
        panels += [axis, "plot " + ", ".join(plots), "set key off"]
    panels += ["unset multiplot", "set key on"]
    for path, terminal in outputs.items():
        lines += [f"set terminal {terminal} size 1200,550 font 'sans,12' background 'white'", f"set output '{path}'", *panels]
    return "\n".join([*lines, "set output", ""])


def report(results: dict) -> str:
    """As JSON, a point a line."""
    points = ",\n".join("    " + json.dumps(point) for point in results["points"])
    settings = json.dumps(results["settings"])
    return f'{{\n  "settings": {settings},\n  "original": {results["original"]},\n  "points": [\n{points}\n  ]\n}}\n'


def table(results: dict) -> str:
    """As Markdown."""
    lines = ["| latents | window | perplexity | state | ms a token |", "|---|---|---|---|---|"]
    for p in results["points"]:
        name = p.get("latents", p.get("adapter"))
        lines.append(f"| {name} | {p['window']:,} | {p['perplexity']:.2f} | {p['state_mb']:.1f} MB | {p['milliseconds']:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latte", type=Path, default=ROOT / "build/latte")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="plain files to train on")
    parser.add_argument("--eval-text", type=Path, required=True)
    parser.add_argument("--latents", type=int, nargs="+", default=[0, 16, 64, 256])
    parser.add_argument("--windows", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--context", type=int, default=4096, help="tokens a sequence in training (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=65536, help="of KL (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--match-window", type=int, default=128)
    parser.add_argument("--match-sequences", type=int, default=8)
    parser.add_argument("--match-steps", type=int, default=32)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a stretch to read (%(default)s)")
    parser.add_argument("--stretches", type=int, default=2)
    parser.add_argument("--depth", type=int, default=2304, help="tokens read before the clock starts (%(default)s)")
    parser.add_argument("--written", type=int, default=64, help="tokens on the clock (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="others, each of which is read at its own window")
    parser.add_argument("--runs", type=Path, required=True, help="folder of adapters and measurements")
    parser.add_argument("--out", type=Path, required=True, help="prefix of the figure and its numbers")
    args = parser.parse_args()
    if args.depth < max(args.windows):
        sys.exit(f"--depth {args.depth} doesn't fill a window of {max(args.windows)}")
    if len({adapter.stem for adapter in args.adapters}) < len(args.adapters):
        sys.exit("--adapters has two files of one name, which is what their figures are kept under")
    args.runs.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    check_settings(args)
    results = collect(args)
    write(Path(f"{args.out}.json"), report(results))
    outputs = {f"{args.out}.svg": "svg dynamic", f"{args.out}.png": "pngcairo"}
    subprocess.run(["gnuplot"], input=script(results, outputs), text=True, check=True)
    print(table(results))


if __name__ == "__main__":
    main()
