"""Tokens a second of training: `latte train` beside the same model in eager PyTorch with scaled_dot_product_attention.

The two take turns, a few seconds each, so that a machine whose speed changes meanwhile changes it for both. The model is the
character model of `latte train`'s defaults (4 blocks of width 128, 4 heads, GELU); AdamW, gradient clipping, no dropout.

Both have the same number of threads, and the same environment: malloc keeps what was freed, as `latte train` has it for itself,
without which eager PyTorch asks the kernel for cleared pages in every step (--malloc default gives both what the system has). Of
both, a turn counts as the median of its steps' times, without the first two; the figure is the median over turns.

    .venv/bin/python bench/train_speed.py
    .venv/bin/python bench/train_speed.py --context 4096 --batch 1 --attention latte,macchiato --threads 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2  # steps of a turn that don't count
# What `latte train` starts itself with, unless the variable is set (src/cli/latte_main.cc).
KEEPING = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.top_pad=268435456"
# "default" sets nothing that matters, which keeps `latte train` from setting more.
TUNABLES = {"keeping": KEEPING, "default": "glibc.malloc.perturb=0"}


class Block(nn.Module):
    """A pre-norm block, as in nanoGPT: [B, T, E] to [B, T, E]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Token ids [B, T] to logits [B, T, V], with learned positions."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, layers: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Eager:
    """Trains the model above on the text, step by step."""

    def __init__(self, args):
        self.args = args
        text = (ROOT / args.text).read_text(encoding="utf-8")
        alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
        self.data = torch.tensor([alphabet[c] for c in text])
        self.model = LanguageModel(len(alphabet), args.context, args.embed_dim, args.heads, args.layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)

    def step(self):
        args = self.args
        starts = torch.randint(len(self.data) - args.context - 1, (args.batch, 1))
        window = self.data[starts + torch.arange(args.context + 1)]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = self.model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        loss.item()

    def tokens_per_second(self, steps: int) -> float:
        """By the median of `steps` steps' times, behind some that warm up."""
        seconds = []
        for _ in range(WARM_UP + steps):
            start = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - start)
        return self.args.batch * self.args.context / statistics.median(seconds[WARM_UP:])


def latte_tokens_per_second(args, attention: str, steps: int) -> float:
    """The same of the steps that `latte train` reports."""
    with tempfile.TemporaryDirectory() as folder:
        command = [ROOT / "build/latte", "train", "--text", ROOT / args.text, "--out", Path(folder) / "run", "--quiet"]
        for name in ("context", "batch", "layers", "embed_dim", "heads", "threads", "dtype"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        command += ["--attention", attention, "--steps", str(steps + WARM_UP), "--eval-every", "0", "--eval-batches", "1"]
        subprocess.run([*command, "--save-every", "0"], check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [args.batch * args.context / json.loads(line)["tokens_per_second"] for line in lines[WARM_UP:]]
    return args.batch * args.context / statistics.median(seconds)


def share_environment(malloc: str) -> None:
    """Starts this program again with malloc's settings, which glibc reads at its start; `latte train` inherits them."""
    if os.environ.get("GLIBC_TUNABLES") != TUNABLES[malloc]:
        os.environ["GLIBC_TUNABLES"] = TUNABLES[malloc]
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="data/tinyshakespeare.txt", help="plain text, relative to the repository")
    parser.add_argument("--context", type=int, default=256, help="tokens a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sequences at once (%(default)s)")
    parser.add_argument("--attention", default="latte,macchiato,softmax", help="what latte train runs (%(default)s)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--malloc", default="keeping", choices=TUNABLES, help="of both (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn, about (%(default)s)")
    args = parser.parse_args()
    share_environment(args.malloc)
    torch.set_num_threads(args.threads)
    eager = Eager(args)
    steps = max(3, round(eager.tokens_per_second(2) * args.seconds / (args.batch * args.context)))
    rates = {"eager PyTorch": []} | {attention: [] for attention in args.attention.split(",")}
    for _ in range(args.rounds):
        for name, seen in rates.items():
            seen.append(eager.tokens_per_second(steps) if name == "eager PyTorch" else latte_tokens_per_second(args, name, steps))
    base = statistics.median(rates["eager PyTorch"])
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, context {args.context}, batch {args.batch}, "
        f"malloc {args.malloc}"
    )
    for name, seen in rates.items():
        print(
            f"{name:14} {statistics.median(seen):9.0f} tokens/s  {statistics.median(seen) / base:5.2f}x   "
            f"({min(seen):.0f} to {max(seen):.0f})"
        )


if __name__ == "__main__":
    main()
