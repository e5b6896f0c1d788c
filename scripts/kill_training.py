#!/usr/bin/env python3
"""Kills latte train, or latte extend, at random moments and checks that nothing is lost.

Each time: a run is started and killed with SIGKILL, at a random moment or, every other time, inside the write of a random
checkpoint; it is resumed (begun again where nothing had been saved) and has to end with the bits of a run that nobody disturbed:
weights, optimizer, random numbers, losses, results.

    scripts/kill_training.py --kills 50            # build/latte, a text of its own, one and two threads in turns
    scripts/kill_training.py --kills 50 --task     # an encoder on a task
    scripts/kill_training.py --kills 50 --extend small.gguf    # a conversion: the adapter has to be the same as well
    scripts/kill_training.py --kills 6 --seed 7 --latte /usr/local/bin/latte

Exit status: 0 when every run ended alike, 1 else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 30
TASK = ["--task", "listops", "--set", "train=200", "--set", "validation=8", "--set", "test=8"]
TASK += ["--set", "min_length=8", "--set", "max_length=32", "--norm", "batch", "--pooled-norm", "batch"]
TRAINING = ["--layers", "2", "--embed-dim", "64", "--heads", "2", "--batch", "4", "--dropout", "0.1"]
TRAINING += ["--steps", str(STEPS), "--warmup", "2", "--eval-every", "7", "--eval-batches", "1", "--save-every", "1", "--quiet"]

EXTENDING = ["--window", "8", "--sinks", "2", "--latents", "4", "--context", "64", "--match-sequences", "2", "--match-steps", "4"]
EXTENDING += ["--dtype", "float32", "--held-out-fraction", "0.1", "--tokens", str(64 * STEPS), "--warmup", "2"]
EXTENDING += ["--eval-every", "7", "--save-every", "1", "--quiet"]


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor's dtype, shape and bytes: a safetensors file is a length, a JSON header and the data."""
    content = checkpoint.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            tensors[name] = entry["step"].encode()
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = f"{entry['dtype']}{entry['shape']}".encode() + content[8 + length + begin : 8 + length + end]
    return tensors


def results_of(run: Path) -> dict:
    """A task's on each split, a text's on its test part."""
    return json.loads((run / "results.json").read_text()) if (run / "results.json").exists() else {}


def losses_of(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["val_loss"], line["grad_norm"]) for line in lines]


class Trial:
    """A run of latte train."""

    def __init__(self, latte: Path, folder: Path, threads: int, task: bool) -> None:
        self.latte, self.run, self.threads, self.task = latte, folder / "run", threads, task
        self.text = folder / "text.txt"
        self.text.write_text("To be, or not to be: that is the question.\n" * 40)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoint.safetensors"

    def reads(self) -> list[str]:
        return TASK if self.task else ["--text", str(self.text), "--context", "32", "--test-fraction", "0.1"]

    def is_over(self) -> bool:
        # Killed while it drew its curve, a run has nothing left to do; killed before that it owes its results.
        steps = int(tensors_of(self.checkpoint)["__metadata__"]) if self.checkpoint.exists() else 0
        return steps == STEPS and (self.run / "results.json").exists()

    def command(self) -> list[str]:
        arguments = ["--resume"] if self.checkpoint.exists() else [*self.reads(), *TRAINING]
        return ["train", "--out", str(self.run), *arguments]

    def results(self) -> object:
        return results_of(self.run)

    def clear(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)

    def start(self) -> subprocess.Popen:
        command = [str(self.latte), *self.command(), "--threads", str(self.threads)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=self.environment)

    def finish(self) -> tuple[dict[str, bytes], list[tuple], object]:
        if not self.is_over():
            process = self.start()
            _, errors = process.communicate()
            if process.returncode != 0:
                raise SystemExit(f"kill_training: a run does not go on: {errors.strip()}")
        return tensors_of(self.checkpoint), losses_of(self.run), self.results()

    def being_written(self) -> bool:
        return any(self.run.glob(".checkpoint.safetensors.*.tmp"))

    def steps_done(self) -> int:
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def kill_somewhere(self, duration: float) -> bool:
        """Whether it was still running."""
        process = self.start()
        until = time.monotonic() + random.uniform(0, duration)
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.002)
        return self.kill(process)

    def kill_inside_a_write(self) -> bool:
        process = self.start()
        step = random.randrange(STEPS - 1)
        while process.poll() is None and not (self.steps_done() >= step and self.being_written()):
            pass
        return self.kill(process)

    @staticmethod
    def kill(process: subprocess.Popen) -> bool:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return process.returncode == -signal.SIGKILL


class Conversion(Trial):
    """A run of latte extend."""

    def __init__(self, latte: Path, folder: Path, threads: int, model: Path) -> None:
        super().__init__(latte, folder, threads, task=False)
        self.model, self.out = model, folder / "out.gguf"
        self.run = folder / "out.gguf.run"
        self.text.write_text("".join(f"line {i * i % 97} of a text with {i % 7}\n" for i in range(400)))

    def is_over(self) -> bool:
        return False  # a run that has nothing left to train still writes the adapter, if that is missing

    def command(self) -> list[str]:
        begin = [str(self.model), "--text", str(self.text), *EXTENDING, "--overwrite"]
        return ["extend", "--out", str(self.out), *(["--resume", "--quiet"] if self.checkpoint.exists() else begin)]

    def results(self) -> object:
        return self.out.read_bytes()

    def clear(self) -> None:
        super().clear()
        self.out.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--task", action="store_true", help="train an encoder on a task, in place of a model of a text")
    parser.add_argument("--extend", type=Path, metavar="MODEL", help="convert this model, in place of training one")
    parser.add_argument("--latte", type=Path, default=Path(__file__).resolve().parents[1] / "build" / "latte")
    options = parser.parse_args()
    random.seed(options.seed)
    differing = kills = missed = inside = before_any = 0
    with tempfile.TemporaryDirectory() as folder:
        trials = [
            Conversion(options.latte, Path(folder), threads, options.extend)
            if options.extend
            else Trial(options.latte, Path(folder), threads, options.task)
            for threads in (1, 2)
        ]
        expected = []
        durations = []
        for trial in trials:
            began = time.monotonic()
            expected.append(trial.finish())
            durations.append(time.monotonic() - began)
            trial.clear()
        while kills < options.kills:
            which = kills // 2 % 2
            trial = trials[which]
            running = trial.kill_inside_a_write() if kills % 2 else trial.kill_somewhere(durations[which])
            if not running:  # it was over before its moment came
                missed += 1
                trial.clear()
                continue
            kills += 1
            inside += trial.being_written()
            before_any += not trial.checkpoint.exists()
            done = trial.steps_done()
            same = trial.finish() == expected[which]
            differing += not same
            print(f"kill {kills}: {trial.threads} threads, after {done} steps: {'same' if same else 'DIFFERENT'}", flush=True)
            trial.clear()
    print(
        f"{kills} kills, {inside} of them inside the write of a checkpoint, {before_any} before there was one, "
        f"{missed} that came too late and were repeated: {kills - differing} runs ended bit for bit as undisturbed ones"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
