"""latte's attention beside two peers on the CPU: the paper's public JAX code, and flash-linear-attention's plain-torch code.

paper  StableScanLatte (causal) and BidLatte (bidirectional) of arXiv 2402.17512 beside latte.LatteAttention of the same weights,
       projections included. "linear ms" is what the four projections alone take in torch: the rest of latte's time is latte's
       (in bfloat16 with AVX2 alone nearly all of it is torch's). "apart" is how far the results, or all gradients, lie
       from each other: ‖latte − peer‖ / ‖peer‖.
fla    its `naive` functions for linear attention, GLA, simple GLA and GSA beside latte.causal_attention on tensors of the same
       sizes (with log_decay where the peer forgets too), without projections. They are the references that fla tests its Triton
       kernels with, which need a GPU; they compute something else than latte does, so there is no "apart".

The sides take turns in one process, with the same number of threads, so that a machine whose speed changes meanwhile changes it
for all. But the machine should have nothing else to do: threads that meet at barriers, as OpenMP's do, suffer more from company
than XLA's do. Times are medians. A peer that isn't there is left out, with a line that says how to get it:

    git clone https://github.com/raresdolga/latte_transformer && pip install jax flax     # --paper latte_transformer
    pip install fla-core einops                                                           # or --fla FOLDER, a checkout

Examples (PYTHONPATH where the package isn't installed; LATTE_OPS_LIBRARY where the operators aren't in build/):

    PYTHONPATH=python python bench/attention_rivals.py --paper ../latte_transformer
    PYTHONPATH=python python bench/attention_rivals.py --peers fla --tokens 1024 --dtypes float32 --threads 2 --json
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import latte
import torch
from torch.nn import functional as F

PASSES = ("forward", "forward + backward")


class Missing(Exception):
    """A peer isn't there; the text says what is missing and how to get it."""


class Contestant:
    """Something to time, and the seconds that its runs took."""

    def __init__(self, work: Callable[[], object]):
        self.work = work
        self.runs: list[float] = []
        self.error = ""

    def run(self) -> None:
        start = time.perf_counter()
        self.work()
        self.runs.append(time.perf_counter() - start)

    def turn(self, seconds: float) -> None:
        """Runs for about so long, once at least, after a run that isn't counted: it finds the caches full of another's data and
        the cores busy with another's waiting threads. Where a run takes longer than the turn that doesn't matter.
        """
        if not self.runs or self.runs[-1] < seconds:
            self.work()
        end = time.perf_counter() + seconds
        self.run()
        while time.perf_counter() < end:
            self.run()

    @property
    def median(self) -> float | None:
        return statistics.median(self.runs) if self.runs else None


def race(contestants: dict[str, Contestant], rounds: int, seconds: float) -> None:
    """Turns for all, `rounds` times; 3 times for whoever takes longer than its time. Peers that fail leave, latte may not."""
    for turn in range(rounds):
        for name, contestant in contestants.items():
            if contestant.error or (turn >= 3 and sum(contestant.runs) > rounds * seconds):
                continue
            try:
                contestant.turn(seconds)
            except Exception as error:  # whatever another release of a peer may raise
                if name.startswith("latte"):
                    raise
                contestant.runs.clear()
                contestant.error = f"failed: {summary(error)}"


def summary(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def load(path: Path, name: str) -> ModuleType:
    """One file as a module, without its package: those import their trainers' dependencies, or Triton."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commit(folder: Path) -> str:
    """The short commit of a checkout, or "" where git doesn't know it."""
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    a, b = (torch.cat([x.double().flatten() for x in side]) for side in (ours, theirs))
    return float((a - b).norm() / b.norm())


class Latte:
    """latte.LatteAttention, and the tensors that both sides get. x, grad_out: [B, T, E]."""

    def __init__(self, args, dtype: torch.dtype, tokens: int, causal: bool):
        self.causal = causal
        sizes = {"num_latents": args.latents, "bias": False, "batch_first": True}
        self.module = latte.LatteAttention(args.embed_dim, args.heads, dtype=dtype, **sizes)
        self.x = torch.randn(args.batch, tokens, args.embed_dim).to(dtype)
        self.grad_out = torch.randn_like(self.x)

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """By the paper's names; each is the transpose of the paper's."""
        m = self.module
        projections = {"Wk": m.key_logits_proj, "Wq": m.query_logits_proj, "Wv": m.value_proj, "o_proj": m.out_proj}
        return {name: projection.weight for name, projection in projections.items()}

    def linear(self, phase: str) -> Callable[[], object]:
        """The four projections alone, each on x."""
        weights = self.weights().values()

        def forward():
            with torch.no_grad():
                return [F.linear(self.x, weight) for weight in weights]

        grads = [torch.randn_like(y) for y in forward()]

        def backward():
            self.module.zero_grad(set_to_none=True)
            x = self.x.detach().requires_grad_()
            torch.autograd.backward([F.linear(x, weight) for weight in weights], grads)

        return forward if phase == "forward" else backward

    def forward(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self.module(self.x, is_causal=self.causal)[0]]

    def backward(self) -> list[torch.Tensor]:
        """The gradients of x and of the weights, these as the paper has them."""
        self.module.zero_grad(set_to_none=True)
        x = self.x.detach().requires_grad_()
        self.module(x, is_causal=self.causal)[0].backward(self.grad_out)
        return [x.grad, *(weight.grad.T for weight in self.weights().values())]


class Paper:
    """The paper's public code. It runs unchanged with jax 0.10.2 and flax 0.12.8; jit and vjp are ours."""

    names = {True: "StableScanLatte", False: "BidLatte"}

    def __init__(self, args):
        self.args = args
        if args.paper is None:
            raise Missing("no --paper FOLDER: git clone https://github.com/raresdolga/latte_transformer FOLDER")
        source = args.paper / "models/modules/latte.py"
        if not source.is_file():
            raise Missing(f"no {source}: git clone https://github.com/raresdolga/latte_transformer {args.paper}")
        # XLA sizes its thread pool by these (the first alone, where it knows it) when the first array is made.
        os.environ.update(JAX_PLATFORMS="cpu", PJRT_NPROC=str(args.threads), NPROC=str(args.threads))
        try:
            import flax
            import jax

            self.jax, self.code = jax, load(source, "paper_latte")
        except ImportError as error:
            raise Missing(f"{error}: pip install jax flax") from error
        self.version = f"paper {commit(args.paper) or 'code'} (jax {jax.__version__}, flax {flax.__version__})"

    def array(self, tensor: torch.Tensor):
        return self.jax.numpy.asarray(tensor.detach().float().numpy(), dtype=str(tensor.dtype).removeprefix("torch."))

    def tensors(self, arrays) -> list[torch.Tensor]:
        return [torch.from_numpy(self.jax.device_get(a.astype("float32")).copy()) for a in arrays]

    def work(self, ours: Latte) -> dict[str, Callable[[], list]]:
        """What each pass runs on latte's tensors: the same results as Latte.forward and Latte.backward."""
        args, jax = self.args, self.jax
        sizes = {"L": args.heads * args.latents, "n_heads": args.heads, "hidden_dim": args.embed_dim}
        if ours.causal:
            sizes["unroll"] = args.unroll
        module = getattr(self.code, self.names[ours.causal])(**sizes)
        weights = {name: self.array(weight.T) for name, weight in ours.weights().items()}
        x, grad_out = self.array(ours.x), self.array(ours.grad_out)

        def apply(x, weights):
            return module.apply({"params": weights}, x, train=False)

        def gradients(x, weights, grad_out):
            y, pullback = jax.vjp(apply, x, weights)
            return pullback(grad_out.astype(y.dtype))  # StableScanLatte's states, and so y, are float32 in any case

        forward, backward = jax.jit(apply), jax.jit(gradients)

        def run_backward():
            grad_x, grad_weights = jax.block_until_ready(backward(x, weights, grad_out))
            return [grad_x, *(grad_weights[name] for name in weights)]

        return dict(zip(PASSES, (lambda: [jax.block_until_ready(forward(x, weights))], run_backward), strict=True))

    def race(self):
        args = self.args
        for dtype in args.dtypes:
            for causal in (True, False):
                for phase in PASSES:
                    for tokens in args.tokens:
                        ours = Latte(args, getattr(torch, dtype), tokens, causal)
                        mine = ours.forward if phase == "forward" else ours.backward
                        theirs = self.work(ours)[phase]
                        sides = {"latte": Contestant(mine), "peer": Contestant(theirs)}
                        sides["latte's projections"] = Contestant(ours.linear(phase))
                        race(sides, args.rounds, args.seconds)
                        row = {"peer": self.names[causal], "attention": "causal" if causal else "bidirectional"}
                        row |= {"dtype": dtype, "pass": phase, "tokens": tokens}
                        difference = None if sides["peer"].error else apart(mine(), self.tensors(theirs()))
                        row |= {"projections_milliseconds": sides["latte's projections"].median * 1e3, "apart": difference}
                        yield finish(row, sides["latte"], sides["peer"])


class Fla:
    """flash-linear-attention's functions that are plain torch, all causal. With states of as many numbers as latte's, but GSA,
    which has two.
    """

    functions = {  # in fla/ops/FOLDER/naive.py: the folder, and what it takes beyond queries, keys and values
        "naive_chunk_linear_attn": ("linear_attn", ()),
        "naive_recurrent_linear_attn": ("linear_attn", ()),
        "naive_chunk_simple_gla": ("simple_gla", ("g",)),
        "naive_recurrent_gla": ("gla", ("gk",)),
        "naive_recurrent_gsa": ("gsa", ("s", "g")),
    }

    def __init__(self, args):
        self.args = args
        if args.fla is not None:
            package = args.fla / "fla"
        else:
            found = importlib.util.find_spec("fla")
            if found is None:
                raise Missing("no package fla and no --fla FOLDER: pip install fla-core einops")
            package = Path(next(iter(found.submodule_search_locations)))
        if not (package / "ops").is_dir():
            raise Missing(f"no {package / 'ops'}: git clone https://github.com/fla-org/flash-linear-attention {args.fla or ''}")
        self.peers = {}
        try:
            for name, (folder, more) in self.functions.items():
                path = package / "ops" / folder / "naive.py"
                function = getattr(load(path, f"fla_{folder}"), name, None) if path.is_file() else None
                if function is None:
                    raise Missing(f"no {name} in {path}: pip install --upgrade fla-core")
                self.peers[name] = (function, more)
                self.check(name)
        except ImportError as error:
            raise Missing(f"{error}: pip install einops") from error
        lines = (package / "__init__.py").read_text(encoding="utf-8").splitlines()
        version = next((line.split("=")[1].strip(" '\"") for line in lines if line.startswith("__version__")), "")
        self.version = f"fla {version}"

    def draw(self, dtype: torch.dtype, tokens: int) -> dict[str, torch.Tensor]:
        args = self.args

        def logits(*size: int) -> torch.Tensor:
            return torch.randn(args.batch, tokens, args.heads, *size)

        size = args.embed_dim // args.heads
        drawn = {"queries": logits(args.latents), "keys": logits(args.latents), "values": logits(size)}
        # Gates as a fresh layer has them; GSA writes to a slot what the slot forgets.
        drawn |= {"g": F.logsigmoid(logits()) / 16, "gk": F.logsigmoid(logits(args.latents)) / 16, "grad_out": logits(size)}
        drawn["s"] = -torch.expm1(drawn["gk"])
        return {name: tensor.to(dtype) for name, tensor in drawn.items()}

    def call(self, name: str, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, T, H, D], as latte has it."""
        function, more = self.peers[name]
        renamed = drawn | {"g": drawn["gk"]} if "s" in more else drawn
        out = function(drawn["queries"], drawn["keys"], drawn["values"], *(renamed[argument] for argument in more))
        return out[0] if isinstance(out, tuple) else out

    def check(self, name: str) -> None:
        """Old releases had heads before tokens: what they'd do with these tensors is no attention, and takes no time."""
        drawn = self.draw(torch.float32, 64)
        try:
            before = self.call(name, drawn)
            drawn["values"][:, 0] += 1
            change = self.call(name, drawn)[:, -1] - before[:, -1]
        except Exception as error:  # whatever another release may raise
            raise Missing(f"{name} fails ({summary(error)}): pip install --upgrade fla-core") from error
        if change.abs().max() < 1e-6:
            raise Missing(f"{name} doesn't take [batch, tokens, heads, size]: pip install --upgrade fla-core")

    def work(self, name: str, drawn: dict[str, torch.Tensor], phase: str) -> Callable[[], object]:
        def compute():
            if name == "latte":
                return latte.causal_attention(drawn["queries"], drawn["keys"], drawn["values"])[0]
            if name == "latte, forgetting":
                return latte.causal_attention(drawn["queries"], drawn["keys"], drawn["values"], log_decay=drawn["gk"])[0]
            return self.call(name, drawn)

        def forward():
            with torch.no_grad():
                compute()

        def backward():
            for argument, tensor in drawn.items():
                tensor.requires_grad_(argument != "grad_out")
                tensor.grad = None
            out = compute()
            out.backward(drawn["grad_out"].to(out.dtype))

        return forward if phase == "forward" else backward

    def race(self):
        args = self.args
        for dtype in args.dtypes:
            for phase in PASSES:
                last: dict[str, tuple[int, float]] = {}  # of each: tokens and seconds of the longest run so far
                for tokens in args.tokens:
                    drawn = self.draw(getattr(torch, dtype), tokens)
                    sides = {}
                    for name in ("latte", "latte, forgetting", *self.peers):
                        sides[name] = Contestant(self.work(name, drawn, phase))
                        before = last.get(name)
                        # In-place writes make the recurrent forms' backward quadratic in tokens.
                        if before and name in self.peers and before[1] * (tokens / before[0]) ** 2 > args.peer_seconds:
                            sides[name].error = f"skipped: over {args.peer_seconds:g} s"
                    race(sides, args.rounds, args.seconds)
                    last |= {name: (tokens, side.median) for name, side in sides.items() if side.runs}
                    for name, (_, more) in self.peers.items():
                        ours = "latte, forgetting" if more else "latte"
                        row = {"peer": name, "attention": "causal, forgetting" if more else "causal"}
                        row |= {"dtype": dtype, "pass": phase, "tokens": tokens}
                        yield finish(row, sides[ours], sides[name])


def finish(row: dict, ours: Contestant, peer: Contestant) -> dict:
    theirs = peer.median
    row |= {"latte_milliseconds": ours.median * 1e3, "peer_milliseconds": None if theirs is None else theirs * 1e3}
    for side, contestant in (("latte", ours), ("peer", peer)):
        row[f"{side}_least_milliseconds"] = min(contestant.runs) * 1e3 if contestant.runs else None
    row |= {"ratio": None if theirs is None else theirs / ours.median}
    return row | ({"note": peer.error} if peer.error else {})


COLUMNS = {"latte ms": "latte_milliseconds", "linear ms": "projections_milliseconds", "peer ms": "peer_milliseconds"}


def show_header() -> None:
    times = " ".join(f"{title:>10}" for title in COLUMNS)
    print(f"\n{'peer':28} {'attention':19} {'dtype':9} {'pass':18} {'tokens':>7} {times} {'faster':>8} {'apart':>7}")


def show(row: dict) -> None:
    def number(name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    what = f"{row['peer']:28} {row['attention']:19} {row['dtype']:9} {row['pass']:18} {row['tokens']:7d}"
    times = " ".join(f"{number(name, '.2f'):>10}" for name in COLUMNS.values())
    faster = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
    print(f"{what} {times} {faster:>8} {number('apart', '.0e'):>7}  {row.get('note', '')}".rstrip(), flush=True)


def hold_to_cpus(count: int) -> None:
    """Keeps this thread, and all that are started from here on, to so many of its CPUs: thread pools have helpers of their own,
    and it is the cores that have to be as many for both sides.
    """
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        if count < len(cpus):
            os.sched_setaffinity(0, cpus[:count])


def main():
    def some(convert: Callable, allowed: tuple = ()) -> Callable[[str], list]:
        def parse(text: str) -> list:
            values = [convert(part) for part in text.split(",")]
            wrong = [value for value in values if (value not in allowed if allowed else value <= 0)]
            if wrong:
                raise ValueError
            return values

        parse.__name__ = f"list of {', '.join(allowed) if allowed else 'positive numbers'}"
        return parse

    def positive(text: str) -> int:
        if int(text) <= 0:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", type=Path, metavar="FOLDER", help="checkout of raresdolga/latte_transformer")
    parser.add_argument("--fla", type=Path, metavar="FOLDER", help="checkout of fla-org/flash-linear-attention, if not installed")
    parser.add_argument("--peers", type=some(str, ("paper", "fla")), default="paper,fla", help="whom to run (%(default)s)")
    parser.add_argument("--tokens", type=some(int), default="1024,2048,4096", help="lengths (%(default)s)")
    parser.add_argument("--dtypes", type=some(str, ("float32", "bfloat16")), default="float32,bfloat16", help="(%(default)s)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of each side (%(default)s)")
    parser.add_argument("--batch", type=positive, default=1, help="sequences (%(default)s)")
    parser.add_argument("--embed-dim", type=positive, default=512, help="width (%(default)s)")
    parser.add_argument("--heads", type=positive, default=8, help="(%(default)s)")
    parser.add_argument("--latents", type=positive, default=64, help="of a head (%(default)s)")
    # On CPUs 1 is faster than the paper's 100 (forward + backward of 4,096 tokens 547 ms beside 1,268) and compiles in seconds.
    parser.add_argument("--unroll", type=positive, default=1, help="StableScanLatte's; its own default is 100 (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn, about (%(default)s)")
    parser.add_argument("--peer-seconds", type=float, default=30.0, help="skip rows of fla that may take longer (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.embed_dim % args.heads != 0:
        parser.error("--embed-dim must be a multiple of --heads")

    hold_to_cpus(args.threads)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peers, missing = [], {}
    for name, kind in {"paper": Paper, "fla": Fla}.items():
        if name in args.peers:
            try:
                peers.append(kind(args))
            except Missing as error:
                missing[name] = str(error)
    load = os.getloadavg()[0]
    if load > 0.6 * (os.cpu_count() or 1):
        print(f"load average {load:.1f} before the start: others are at work, which may distort the ratios", file=sys.stderr)
    sizes = {"threads": args.threads, "batch": args.batch, "embed_dim": args.embed_dim, "heads": args.heads}
    sizes |= {"latents": args.latents, "unroll": args.unroll}
    if not args.json:
        print(", ".join([f"torch {torch.__version__}", *(peer.version for peer in peers)]))
        print(", ".join(f"{name.replace('_', '-')} {value}" for name, value in sizes.items()))
    for name, text in missing.items():
        print(f"{name} is left out: {text}", file=sys.stderr if args.json else sys.stdout)
    if peers and not args.json:
        show_header()
    rows = []
    for peer in peers:
        for row in peer.race():
            rows.append(row)
            if not args.json:
                show(row)
    if args.json:
        versions = {"torch": torch.__version__, "peers": [peer.version for peer in peers]}
        print(json.dumps(versions | sizes | {"load_average": load} | {"missing": missing, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
