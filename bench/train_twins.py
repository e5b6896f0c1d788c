"""Quality of training: latent attention, Macchiato and softmax, trained alike at several learning rates.

Every run is `latte train` on the same text with the same seed, batches and steps. Runs that stand in --out are not repeated,
those that were stopped go on from their last checkpoint, a hundred steps ago at most: the same command again is all it takes.
Prints each run's validation loss, the best of each attention, and its distance from softmax's; draws all curves to
--out/loss.svg. With --report PREFIX the curves of all runs go to PREFIX.json, PREFIX.svg and PREFIX.png, and with --docs FILE a
table of them and the figure into FILE, between the lines `<!-- twins NAME -->` and `<!-- end -->`, NAME being PREFIX's last part.

    .venv/bin/python bench/train_twins.py                      # 3 x 3 runs of 1,000 steps, some 10 to 45 minutes on two cores
    .venv/bin/python bench/train_twins.py --steps 200 --lr 2e-3
    nohup nice .venv/bin/python bench/train_twins.py --layers 6 --embed-dim 384 --heads 6 --dtype bfloat16 --lr 5e-4,1e-3,2e-3 \\
      --threads 1 --report docs/figures/twins-6x384 --docs docs/training.md -- --eval-every 200 >twins.log 2>&1 &      # hours
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"num_layers": "layers", "embed_dim": "embed_dim", "num_heads": "heads", "window": "window"}
DECAY_RANK = 16  # latte train's; runs from before it have none in their configuration
MORE = "twins.json"  # in a run's folder: its text and what else was asked for
TRAINING = {name: name for name in ("context", "batch", "eval_batches", "steps", "seed")}

Runs = dict[tuple[str, str], list[dict]]


def metrics(run: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


def validations(steps: list[dict]) -> list[dict]:
    return [step for step in steps if step["val_loss"] is not None]


def check_same(run: Path, args, attention: str, lr: str) -> None:
    """Ends the program where `run` was trained otherwise than it would be now."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    model, training = config["model"], config["training"]
    found = {ours: model[name] for name, ours in MODEL.items()} | {ours: training[name] for name, ours in TRAINING.items()}
    wanted = {name: getattr(args, name) for name in found}
    found |= {"attention": model["attention"], "lr": training["lr"]}
    wanted |= {"attention": attention, "lr": float(lr)}
    if attention in ("latte", "macchiato") and "--decay-rank" not in args.more:
        found["decay_rank"], wanted["decay_rank"] = model.get("decay_rank", 0), DECAY_RANK
    if (run / MORE).exists():
        found["more"], wanted["more"] = json.loads((run / MORE).read_text(encoding="utf-8")), [Path(args.text).name, *args.more]
    if args.dtype != "auto":
        found["dtype"], wanted["dtype"] = training["dtype"], args.dtype
    differing = [f"{name} {found[name]}, not {wanted[name]}" for name in found if found[name] != wanted[name]]
    if differing:
        sys.exit(f"{run} was trained with {'; '.join(differing)}: --out names another folder")


def train(run: Path, args, attention: str, lr: str) -> None:
    if (run / "config.json").exists():
        check_same(run, args, attention, lr)
    steps = metrics(run)
    if steps and steps[-1]["step"] >= args.steps and (run / "checkpoint.safetensors").exists():
        return
    command = [ROOT / "build/latte", "train", "--out", run, "--steps", str(args.steps), "--threads", str(args.threads)]
    if (run / "checkpoint.safetensors").exists():
        command.append("--resume")
    else:
        command += ["--text", args.text, "--attention", attention, "--lr", lr, "--overwrite", *args.more]
        for name in (*MODEL.values(), "context", "batch", "eval_batches", "seed", "dtype"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        write(run / MORE, json.dumps([Path(args.text).name, *args.more]) + "\n")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=None if sys.stderr.isatty() else subprocess.DEVNULL)


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def draw(prefix: Path, runs: Runs, terminals: dict[str, str]) -> None:
    """All validation curves, by gnuplot: a file of each of `terminals`, {suffix: terminal}."""
    colours = {"softmax": "#4c566a", "latte": "#b48ead", "macchiato": "#d08770", "window": "#a3be8c"}
    lines = ["set key top right", "set xlabel 'step'", "set ylabel 'validation loss (nats a token)'", "set grid"]
    rates = sorted({lr for _, lr in runs}, key=float)
    plots = []
    for (attention, lr), steps in runs.items():
        data = f"$curve{len(plots)}"
        points = [f"{step['step']} {step['val_loss']}" for step in validations(steps)]
        lines += [f"{data} << END_OF_DATA", *points, "END_OF_DATA"]
        style = f"with linespoints dashtype {rates.index(lr) + 1} pointtype {rates.index(lr) + 5} pointsize 0.5"
        colour = f"linecolor rgb '{colours.get(attention, '#000000')}'"
        plots.append(f"{data} {style} {colour} title '{attention}, learning rate {lr}'")
    for suffix, terminal in terminals.items():
        lines += [f"set terminal {terminal} size 900,600 font 'sans,13' background 'white'", f"set output '{prefix}{suffix}'"]
        lines.append("plot " + ", ".join(plots))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gnuplot"], input="\n".join([*lines, "set output", ""]), text=True, check=True)


def report(args, runs: Runs) -> str:
    """All curves and what made them, as JSON."""
    settings = {name: getattr(args, name) for name in (*MODEL.values(), *TRAINING.values(), "dtype", "threads")}
    settings |= {"text": Path(args.text).name, "more": args.more}
    curves = [
        {
            "attention": attention,
            "lr": float(lr),
            "validation": [[step["step"], round(step["val_loss"], 5)] for step in validations(steps)],
        }
        for (attention, lr), steps in runs.items()
    ]
    lines = ",\n".join("    " + json.dumps(curve) for curve in curves)
    return f'{{\n  "settings": {json.dumps(settings)},\n  "runs": [\n{lines}\n  ]\n}}\n'


def table(args, runs: Runs) -> str:
    """The last losses as Markdown, with what the best rates say."""
    lines = [f"| attention | learning rate | at step {args.steps:,} |", "|---|---|---|"]
    best = best_losses(runs)
    for (attention, lr), steps in sorted(runs.items(), key=lambda run: (run[0][0], float(run[0][1]))):
        lines.append(f"| {attention} | {float(lr):g} | {validations(steps)[-1]['val_loss']:.3f} |")
    if "softmax" in best and len(best) > 1:
        beside = [
            f"{attention} ends {abs(loss - best['softmax']):.3f} {'below' if loss < best['softmax'] else 'above'} softmax"
            for attention, loss in sorted(best.items())
            if attention != "softmax"
        ]
        lines += ["", f"At the best of the rates {', '.join(beside)}."]
    return "\n".join(lines)


def show_in(docs: Path, prefix: Path, text: str) -> None:
    """Puts `text` and the figure between the lines of `docs` that are meant for it."""
    begin, end = f"<!-- twins {prefix.name} -->\n", "<!-- end -->"
    before, found, rest = docs.read_text(encoding="utf-8").partition(begin)
    if not found or end not in rest:
        sys.exit(f"{docs} has no lines {begin.strip()} and {end}")
    figure = Path(os.path.relpath(f"{prefix}.svg", docs.parent)).as_posix()
    curves = Path(os.path.relpath(f"{prefix}.json", docs.parent)).as_posix()
    shown = f"{text}\n\n![Validation loss over steps of every run]({figure})\n\n[All curves as numbers]({curves})\n"
    write(docs, before + begin + shown + rest[rest.index(end) :])


def best_losses(runs: Runs) -> dict[str, float]:
    best = {}
    for (attention, _), steps in runs.items():
        loss = validations(steps)[-1]["val_loss"]
        best[attention] = min(loss, best.get(attention, loss))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=ROOT / "data/tinyshakespeare.txt")
    parser.add_argument("--attention", default="softmax,latte,macchiato")
    parser.add_argument("--lr", default="2e-3,4e-3,8e-3")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--window", type=int, default=32, help="of macchiato (%(default)s)")
    parser.add_argument("--eval-batches", type=int, default=100, help="batches a validation (%(default)s)")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of products (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the runs are (runs/twins-LAYERSxWIDTH)")
    parser.add_argument("--report", type=Path, help="prefix of the files that all curves are written to")
    parser.add_argument("--docs", type=Path, help="with --report: the document that shows them")
    parser.add_argument("more", nargs="*", help="further options of latte train, after --")
    args = parser.parse_args()
    if args.docs and not args.report:
        parser.error("--docs shows the files of --report")
    args.out = args.out or ROOT / f"runs/twins-{args.layers}x{args.embed_dim}"

    runs = {}
    for attention in args.attention.split(","):
        for lr in args.lr.split(","):
            run = args.out / f"{attention}-{lr}"
            train(run, args, attention, lr)
            runs[attention, lr] = metrics(run)
            last = validations(runs[attention, lr])[-1]
            print(f"{attention:10} lr {lr:6} step {last['step']:5}  validation loss {last['val_loss']:.4f}", flush=True)
            draw(args.out / "loss", runs, {".svg": "svg"})
    if args.report:
        draw(args.report, runs, {".svg": "svg", ".png": "pngcairo"})
        write(args.report.with_name(args.report.name + ".json"), report(args, runs))
    if args.docs:
        show_in(args.docs, args.report, table(args, runs))
    best = best_losses(runs)
    print()
    for attention, loss in best.items():
        beside = f"  {loss - best['softmax']:+.4f} beside softmax" if "softmax" in best else ""
        print(f"best {attention:10} {loss:.4f}{beside}")


if __name__ == "__main__":
    main()
