"""Quality of training: latent attention, Macchiato and softmax, trained alike at several learning rates.

Every run is `latte train` on the same text with the same seed, batches and steps. Runs that stand in --out are not repeated,
those that were stopped go on. Prints each run's validation loss, the best of each attention, and its distance from softmax's;
draws all curves to --out/loss.svg.

    .venv/bin/python bench/train_twins.py                      # 3 x 3 runs of 1,000 steps, some 10 to 45 minutes on two cores
    .venv/bin/python bench/train_twins.py --steps 200 --lr 2e-3
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def metrics(run: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


def train(run: Path, args, attention: str, lr: str) -> None:
    steps = metrics(run)
    if steps and steps[-1]["step"] >= args.steps:
        return
    command = [ROOT / "build/latte", "train", "--out", run, "--steps", str(args.steps)]
    if (run / "checkpoint.safetensors").exists():
        command.append("--resume")
    else:
        command += ["--text", args.text, "--attention", attention, "--lr", lr, "--batch", str(args.batch), "--overwrite"]
        command += ["--window", str(args.window), "--eval-batches", str(args.eval_batches), "--threads", str(args.threads)]
        command += [*args.more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=None if sys.stderr.isatty() else subprocess.DEVNULL)


def draw(folder: Path, runs: dict[tuple[str, str], list[dict]]) -> None:
    """All validation curves, by gnuplot."""
    colours = {"softmax": "#4c566a", "latte": "#b48ead", "macchiato": "#d08770", "window": "#a3be8c"}
    lines = ["set terminal svg size 900,600 font 'sans,13'", f"set output '{folder / 'loss.svg'}'", "set key top right"]
    lines += ["set xlabel 'step'", "set ylabel 'validation loss (nats a token)'", "set grid"]
    rates = sorted({lr for _, lr in runs}, key=float)
    plots, data = [], []
    for (attention, lr), steps in runs.items():
        title = f"{attention}, learning rate {lr}"
        style = f"with linespoints dashtype {rates.index(lr) + 1} pointtype {rates.index(lr) + 5} pointsize 0.5"
        plots.append(f"'-' {style} linecolor rgb '{colours.get(attention, '#000000')}' title '{title}'")
        data += [f"{step['step']} {step['val_loss']}" for step in steps if step["val_loss"] is not None] + ["e"]
    program = "\n".join([*lines, "plot " + ", ".join(plots), *data])
    subprocess.run(["gnuplot"], input=program, text=True, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=ROOT / "data/tinyshakespeare.txt")
    parser.add_argument("--attention", default="softmax,latte,macchiato")
    parser.add_argument("--lr", default="2e-3,4e-3,8e-3")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=32, help="of macchiato (%(default)s)")
    parser.add_argument("--eval-batches", type=int, default=100, help="batches a validation (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/twins")
    parser.add_argument("more", nargs="*", help="further options of latte train, after --")
    args = parser.parse_args()

    runs = {}
    for attention in args.attention.split(","):
        for lr in args.lr.split(","):
            run = args.out / f"{attention}-{lr}"
            train(run, args, attention, lr)
            runs[attention, lr] = metrics(run)
            last = [step for step in runs[attention, lr] if step["val_loss"] is not None][-1]
            print(f"{attention:10} lr {lr:6} step {last['step']:5}  validation loss {last['val_loss']:.4f}", flush=True)
            draw(args.out, runs)
    best = {}
    for (attention, _), steps in runs.items():
        loss = [step["val_loss"] for step in steps if step["val_loss"] is not None][-1]
        best[attention] = min(loss, best.get(attention, loss))
    print()
    for attention, loss in best.items():
        beside = f"  {loss - best['softmax']:+.4f} beside softmax" if "softmax" in best else ""
        print(f"best {attention:10} {loss:.4f}{beside}")


if __name__ == "__main__":
    main()
