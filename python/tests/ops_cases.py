"""What the tests of the operators share: the library, small inputs, the definitions in plain torch, and how close is close."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import latte  # noqa: F401  (loads the library)
except ImportError:
    torch.ops.load_library(os.environ["LATTE_OPS_LIBRARY"])

ops = torch.ops.latte
ACCUMULATE = {torch.float64: torch.float64}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return ACCUMULATE.get(dtype, torch.float32)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """float64, the same on every call."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def assert_close(got: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """‖got - expected‖ ≤ tolerance · (‖expected‖ + √n); infinities must agree."""
    assert got.shape == expected.shape, f"{what}: got shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach().double(), expected.detach().double()
    infinite = expected.isinf()
    assert torch.equal(got.isinf(), infinite) and torch.equal(got[infinite], expected[infinite]), f"{what}: infinities differ"
    got, expected = got[~infinite], expected[~infinite]
    assert got.isfinite().all(), f"{what}: not finite"
    error, limit = (got - expected).norm(), tolerance * (expected.norm() + got.numel() ** 0.5)
    assert error <= limit, f"{what}: error {error:.3e} exceeds {limit:.3e}"


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class Case:
    """A call of one public operator. `inputs` are differentiable, in float64, cast as the call needs; `states` (float32 beside
    narrower inputs) likewise; the rest passes through.
    """

    operator: str
    inputs: dict[str, Tensor]
    states: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    caches: dict[str, Tensor] = field(default_factory=dict)  # of a MacchiatoState, by name

    def tensors(self, dtype: torch.dtype, requires_grad: bool = False) -> dict[str, Tensor]:
        cast = {name: x.to(dtype) for name, x in {**self.inputs, **self.caches}.items()}
        cast |= {name: x.to(state_dtype(dtype)) for name, x in self.states.items()}
        return {name: x.detach().requires_grad_(requires_grad) for name, x in cast.items()}

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The operator's arguments by name, with a MacchiatoState's parts, given or of `rest`, in one list."""
        arguments = {**self.rest, **tensors}
        if self.caches:
            arguments["initial_state"] = [arguments.pop(name) for name in STATE_PARTS]
        return arguments

    def __call__(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """The outputs that are there, states as parts that carry gradients."""
        result = getattr(ops, self.operator)(**self.arguments(tensors))
        flat: list[Tensor] = []
        for x in [result] if isinstance(result, Tensor) else result:
            flat += [x] if isinstance(x, Tensor) else list(x)
        return [x for x in flat if x.numel() > 0]

    def readable(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """The outputs that carry gradients, a latent state as what it means: S, z times exp(m), and G."""
        outputs = []
        for x in self(tensors):
            if not x.is_floating_point():
                continue
            if self.operator in LATENT and x.dim() == 4 and x.shape[-1] == self.state_width():
                outputs += list(meaning(x))
            else:
                outputs.append(x)
        return outputs

    def state_width(self) -> int:
        return self.inputs["values"].shape[-1] + 3 if "values" in self.inputs else self.states["left"].shape[-1]


LATENT = ("causal_attention", "macchiato_attention", "merge_states")
STATE_PARTS = ("latents", "keys", "values_", "mask", "sink_keys", "sink_values", "sink_mask", "position")


def meaning(state: Tensor) -> tuple[Tensor, Tensor]:
    """A state whatever its maxima are relative to: the mean values Σwv/Σw with log Σw, and the decay.

    Where nothing was seen: zeros.
    """
    sums, normaliser, maximum, decay = state[..., :-3], state[..., -3], state[..., -2], state[..., -1]
    seen = normaliser > 0
    safe = torch.where(seen, normaliser, 1.0)
    weight = torch.where(seen, safe.log() + torch.where(seen, maximum, 0.0), 0.0)
    return torch.cat([torch.where(seen.unsqueeze(-1), sums / safe.unsqueeze(-1), 0.0), weight.unsqueeze(-1)], -1), decay


def fresh_state(rows: int, kv_heads: int, latents: int, head_dim: int) -> Tensor:
    state = torch.zeros(rows, kv_heads, latents, head_dim + 3, dtype=torch.float64)
    state[..., -2] = -torch.inf
    return state


def some_state(rows: int, kv_heads: int, latents: int, head_dim: int, seed: int) -> Tensor:
    """A state that six tokens left, of which the first row's first latent has seen nothing."""
    k = normal(rows, 6, kv_heads, latents, seed=seed)
    k[:1, :, :, 0] = -torch.inf
    v = normal(rows, 6, kv_heads, head_dim, seed=seed + 1)
    g = -normal(rows, 6, kv_heads, latents, seed=seed + 2).abs() * 0.1
    return ops.causal_attention(k, k, v, log_decay=g, output_final_state=True)[1]


def attention(
    *,
    causal: bool = True,
    batch: int = 2,
    time: int = 37,
    heads: int = 4,
    kv_heads: int = 2,
    latents: int = 5,
    head_dim: int = 6,
    decay: bool = False,
    mask: bool = False,
    state: bool = False,
    packed: bool = False,
    seed: int = 0,
) -> Case:
    if packed:
        batch = 1
    sequences = 4 if packed else batch
    case = Case(
        "causal_attention" if causal else "bidirectional_attention",
        {
            "query_logits": normal(batch, time, heads, latents, seed=seed, scale=2.0),
            "key_logits": normal(batch, time, kv_heads, latents, seed=seed + 1, scale=2.0),
            "values": normal(batch, time, kv_heads, head_dim, seed=seed + 2),
        },
    )
    if decay:
        case.inputs["log_decay"] = -normal(batch, time, kv_heads, latents, seed=seed + 3).abs()
    if mask:
        case.rest["key_mask"] = normal(batch, time, seed=seed + 4) > -0.5
    if packed:
        case.rest["cu_seqlens"] = torch.tensor([0, time // 3, time // 3, time - 1, time])
    if state:
        case.states["initial_state"] = some_state(sequences, kv_heads, latents, head_dim, seed + 5)
    if causal:
        case.rest["output_final_state"] = state
    return case


def macchiato(
    *,
    causal: bool = True,
    window: int = 5,
    sinks: int = 0,
    batch: int = 2,
    time: int = 37,
    heads: int = 4,
    kv_heads: int = 2,
    latents: int = 5,
    head_dim: int = 6,
    key_dim: int = 8,
    decay: bool = False,
    mask: bool = False,
    state: bool = False,
    packed: bool = False,
    sink_query: bool = False,
    seed: int = 10,
) -> Case:
    if packed:
        batch = 1
    case = Case(
        "macchiato_attention",
        {
            "query": normal(batch, time, heads, key_dim, seed=seed),
            "key": normal(batch, time, kv_heads, key_dim, seed=seed + 1),
            "values": normal(batch, time, kv_heads, head_dim, seed=seed + 2),
            "query_logits": normal(batch, time, heads, latents + 1, seed=seed + 3),
            "key_logits": normal(batch, time, kv_heads, latents, seed=seed + 4),
        },
        rest={"window": window, "sinks": sinks, "causal": causal, "output_final_state": state},
    )
    if sink_query:
        case.inputs["sink_query"] = normal(batch, time, heads, key_dim, seed=seed + 5)
    if decay:
        case.inputs["log_decay"] = -normal(batch, time, kv_heads, latents, seed=seed + 6).abs()
    if mask:
        case.rest["key_mask"] = normal(batch, time, seed=seed + 7) > -0.5
    if packed:
        case.rest["cu_seqlens"] = torch.tensor([0, time // 3, time // 3, time - 1, time])
    if state:
        sequences = 4 if packed else batch
        position = torch.tensor([1, 2, window + 3, 0])[:sequences]
        case.states["latents"] = some_state(sequences, kv_heads, latents, head_dim, seed + 8)
        case.caches = {
            "keys": normal(sequences, window, kv_heads, key_dim, seed=seed + 11),
            "values_": normal(sequences, window, kv_heads, head_dim, seed=seed + 12),
            "sink_keys": normal(sequences, sinks, kv_heads, key_dim, seed=seed + 13),
            "sink_values": normal(sequences, sinks, kv_heads, head_dim, seed=seed + 14),
        }
        row = torch.arange(window)
        case.rest |= {
            "mask": (row >= window - position.unsqueeze(1)) & (normal(sequences, window, seed=seed + 15) > -1),
            "sink_mask": (torch.arange(sinks) < position.unsqueeze(1)) & (normal(sequences, sinks, seed=seed + 16) > -1),
            "position": position,
        }
    return case


def window(**options: Any) -> Case:
    """The window of `macchiato` alone; its state's latents have no element."""
    case = macchiato(**options)
    case.operator = "window_attention"
    case.inputs = {name: x for name, x in case.inputs.items() if name in ("query", "key", "values", "sink_query")}
    if case.states:
        del case.states["latents"]
        case.rest["latents"] = torch.zeros(0)
    return case


def merge() -> Case:
    return Case("merge_states", {}, {"left": some_state(2, 2, 3, 4, 60), "right": some_state(2, 2, 3, 4, 70)})


def convolution(*, width: int = 4, bias: bool = True, mask: bool = False, state: bool = False, packed: bool = False) -> Case:
    batch, time, channels = (1 if packed else 2), 37, 7
    case = Case(
        "causal_conv1d",
        {"x": normal(batch, time, channels, seed=30)},
        {"weight": normal(channels, width, seed=31)},
        {"output_final_state": state},
    )
    return _channels(case, batch, time, channels, mask, state, packed, (width - 1, channels), bias)


def recurrence(*, mask: bool = False, state: bool = False, packed: bool = False) -> Case:
    batch, time, channels = (1 if packed else 2), 37, 7
    case = Case(
        "rg_lru",
        {name: normal(batch, time, channels, seed=40 + i) for i, name in enumerate(("x", "recurrence_logits", "input_logits"))},
        {"lambda_": normal(channels, seed=43)},
        {"output_final_state": state},
    )
    return _channels(case, batch, time, channels, mask, state, packed, (channels,), False)


def _channels(
    case: Case, batch: int, time: int, channels: int, mask: bool, state: bool, packed: bool, shape: tuple[int, ...], bias: bool
) -> Case:
    if bias:
        case.states["bias"] = normal(channels, seed=33)
    if mask:
        case.rest["key_mask"] = normal(batch, time, seed=34) > -0.5
    if packed:
        case.rest["cu_seqlens"] = torch.tensor([0, time // 3, time // 3, time - 1, time])
    if state:
        case.states["initial_state"] = normal(4 if packed else batch, *shape, seed=35)
    return case


CASES: dict[str, Callable[..., Case]] = {
    "causal": lambda **k: attention(**k),
    "causal-decay": lambda **k: attention(decay=True, **k),
    "causal-mask-state": lambda **k: attention(decay=True, mask=True, state=True, **k),
    "causal-packed": lambda **k: attention(decay=True, mask=True, state=True, packed=True, **k),
    "bidirectional": lambda **k: attention(causal=False, **k),
    "bidirectional-packed": lambda **k: attention(causal=False, mask=True, packed=True, **k),
    "macchiato": lambda **k: macchiato(**k),
    "macchiato-sinks": lambda **k: macchiato(sinks=3, sink_query=True, decay=True, mask=True, **k),
    "macchiato-state": lambda **k: macchiato(sinks=3, sink_query=True, decay=True, mask=True, state=True, **k),
    "macchiato-packed": lambda **k: macchiato(sinks=3, sink_query=True, mask=True, state=True, packed=True, **k),
    "macchiato-bidirectional": lambda **k: macchiato(causal=False, mask=True, **k),
    "macchiato-bidirectional-packed": lambda **k: macchiato(causal=False, mask=True, packed=True, **k),
    "window": lambda **k: window(**k),
    "window-sinks": lambda **k: window(sinks=3, sink_query=True, mask=True, **k),
    "window-state": lambda **k: window(sinks=3, sink_query=True, mask=True, state=True, **k),
    "window-packed": lambda **k: window(sinks=3, mask=True, state=True, packed=True, **k),
    "window-bidirectional": lambda **k: window(causal=False, mask=True, **k),
    "merge": lambda **k: merge(),
    "convolution": lambda **k: convolution(),
    "convolution-state": lambda **k: convolution(mask=True, state=True),
    "convolution-packed": lambda **k: convolution(mask=True, state=True, packed=True),
    "recurrence": lambda **k: recurrence(),
    "recurrence-state": lambda **k: recurrence(mask=True, state=True),
    "recurrence-packed": lambda **k: recurrence(mask=True, state=True, packed=True),
    "linear": lambda **k: Case(
        "linear", {"x": normal(2, 9, 8, seed=52), "weight": normal(7, 8, seed=53), "bias": normal(7, seed=54)}
    ),
    "vapor": lambda **k: Case("vapor", {"x": normal(2, 9, 3, 8, seed=50)}),
    "vapor-positions": lambda **k: Case(
        "vapor", {"x": normal(2, 4, 3, 8, seed=51)}, rest={"positions": torch.tensor([0, 7, 1000, 123456]), "inverse": True}
    ),
}
