"""Wrong inputs: ValueError or TypeError, with what came and what was expected, and never a crash."""

from __future__ import annotations

import latte
import pytest
import torch
from ops_cases import Case, attention, convolution, macchiato, ops, recurrence


def attempt(case: Case, **changes: object) -> None:
    arguments = case.arguments(case.tensors(torch.float32))
    for name, change in changes.items():
        arguments[name] = change(arguments.get(name)) if callable(change) else change
    getattr(ops, case.operator)(**arguments)


def check(error: type[Exception], text: str, case: Case, **changes: object) -> None:
    attempt(case)
    with pytest.raises(error) as caught:
        attempt(case, **changes)
    message = str(caught.value)
    # What only the data tells is found by the operator that reads it.
    assert message.startswith((f"[latte.{case.operator}]", f"[latte.{case.operator}_core]")), message
    assert text in message, message


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_message() -> None:
    case = attention()
    with pytest.raises(ValueError) as caught:
        attempt(case, values=torch.zeros(2, 36, 2, 6))
    expected = "[latte.causal_attention] values: got shape [2, 36, 2, 6], expected [B, T, Hkv, D] = [2, 37, 2, 6]"
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("name", ["query_logits", "key_logits", "values"])
def test_no_tensor(name: str) -> None:
    arguments = dict(zip(("query_logits", "key_logits", "values"), torch.randn(3, 1, 4, 2, 3), strict=True)) | {name: None}
    with pytest.raises(TypeError, match=name):
        latte.causal_attention(**arguments)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("query_logits: got shape", {"query_logits": lambda x: x[0]}),
        ("query_logits: got shape", {"query_logits": lambda x: x[..., :-1]}),
        ("heads: got H = 3", {"query_logits": lambda x: x[:, :, :3]}),
        ("heads: got H = 0", {"query_logits": lambda x: x[:, :, :0]}),
        ("Hkv", {"key_logits": lambda x: x[:, :, :0]}),
        ("L, the latents", {"key_logits": lambda x: x[..., :0], "query_logits": lambda x: x[..., :0]}),
        ("D, the head size", {"values": lambda x: x[..., :0]}),
        ("key_mask: got shape", {"key_mask": torch.ones(2, 36, dtype=torch.bool)}),
        ("log_decay: got shape", {"log_decay": torch.zeros(2, 37, 4, 5)}),
        ("initial_state: got shape", {"initial_state": torch.zeros(2, 2, 5, 8)}),
        ("expected B = 1", {"cu_seqlens": integers(0, 37)}),
    ],
)
def test_values(text: str, changes: dict) -> None:
    check(ValueError, text, attention(), **changes)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("values: got dtype", {"values": lambda x: x.bfloat16()}),
        ("query_logits: got dtype", {"query_logits": lambda x: x.long()}),
        ("key_mask: got dtype", {"key_mask": torch.ones(2, 37)}),
        ("initial_state: got dtype", {"initial_state": torch.zeros(2, 2, 5, 9, dtype=torch.float64)}),
        ("values: got device", {"values": lambda x: x.to("meta")}),
        ("cu_seqlens: got dtype", {"cu_seqlens": torch.tensor([0, 37], dtype=torch.int32)}),
    ],
)
def test_types(text: str, changes: dict) -> None:
    check(TypeError, text, attention(), **changes)


@pytest.mark.parametrize(
    "ends", [[1, 37], [0, 36], [0, 38], [0, 20, 10, 37], [0, -5, 37], [], [0], [0, 2**62, 37], [[0, 37]]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cu_seqlens(ends: list, dtype: torch.dtype) -> None:
    ends = torch.tensor(ends, dtype=torch.int64)
    for case in (attention(batch=1), attention(batch=1, causal=False), macchiato(batch=1), convolution(), recurrence()):
        tensors = {key: x if key in case.states else x[:1] for key, x in case.tensors(dtype).items()}
        with pytest.raises(ValueError, match="cu_seqlens"):
            getattr(ops, case.operator)(**tensors, **case.rest, cu_seqlens=ends)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("window: got 0", {"window": 0}),
        ("sinks: got -1", {"sinks": -1}),
        ("initial_state: got one of window", {"window": 4}),
        ("initial_state: got one of window", {"sinks": 2}),
        ("initial_state: got 7 tensors", {"initial_state": lambda s: s[:7]}),
        ("output_final_state", {"causal": False, "initial_state": None, "sinks": 0, "log_decay": None}),
        ("initial_state", {"causal": False, "output_final_state": False, "sinks": 0, "log_decay": None}),
        ("sinks", {"causal": False, "output_final_state": False, "initial_state": None, "log_decay": None}),
        ("log_decay", {"causal": False, "output_final_state": False, "initial_state": None, "sinks": 0}),
        ("key: got shape", {"key": lambda x: x[..., :-1]}),
        ("values: got shape", {"values": lambda x: x[:, :-1]}),
        ("sink_query: got shape", {"sink_query": lambda x: x[:, :, :2]}),
        ("query_logits: got shape", {"query_logits": lambda x: x[..., 1:]}),
        ("scale", {"scale": float("nan")}),
        ("scale", {"scale": 1e300}),
        ("position", {"initial_state": lambda s: [*s[:7], torch.tensor([-1, 3])]}),
        ("position", {"initial_state": lambda s: [*s[:7], torch.tensor([2**63 - 1, 3])]}),
        ("past_values: got shape", {"initial_state": lambda s: [*s[:2], s[2][:, :-1], *s[3:]]}),
        ("sink_mask: got shape", {"initial_state": lambda s: [*s[:6], s[6][:1], s[7]]}),
    ],
)
def test_macchiato(text: str, changes: dict) -> None:
    check(ValueError, text, macchiato(decay=True, state=True, sinks=3, sink_query=True), **changes)


def test_far_bounds() -> None:
    """Windows, sinks and positions beyond the text are no error and no overflow."""
    case = macchiato(state=True, sinks=3)
    attempt(macchiato(), window=2**62)
    attempt(macchiato(causal=False), window=2**63 - 1)
    attempt(case, initial_state=lambda s: [*s[:7], torch.tensor([2**60, 2**60])])


def test_channels() -> None:
    check(ValueError, "weight: got shape", convolution(), weight=lambda x: x[:-1])
    check(ValueError, "K, the width", convolution(), weight=lambda x: x[:, :0])
    check(ValueError, "bias: got shape", convolution(), bias=lambda x: x[:-1])
    check(ValueError, "initial_state: got shape", convolution(), initial_state=torch.zeros(2, 4, 7))
    check(TypeError, "weight: got dtype", convolution(), weight=lambda x: x.long())
    check(ValueError, "recurrence_logits: got shape", recurrence(), recurrence_logits=lambda x: x[:1])
    check(ValueError, "lambda: got shape", recurrence(), lambda_=lambda x: x[:-1])
    check(TypeError, "input_logits: got dtype", recurrence(), input_logits=lambda x: x.half())
    vapor = Case("vapor", {"x": torch.zeros(2, 3, 1, 4, dtype=torch.float64)})
    check(ValueError, "expected an even head size", vapor, x=torch.zeros(2, 3, 1, 5))
    check(ValueError, "positions: got shape", vapor, positions=integers(0, 1))
    check(TypeError, "positions: got dtype", vapor, positions=torch.zeros(3))
    check(ValueError, "base", vapor, base=0.0)
    check(ValueError, "base", vapor, base=float("inf"))
    merge = Case("merge_states", {name: torch.zeros(1, 2, 3, 7, dtype=torch.float64) for name in ("left", "right")})
    check(ValueError, "right: got shape", merge, right=torch.zeros(1, 2, 3, 8))
    check(TypeError, "right: got dtype", merge, right=torch.zeros(1, 2, 3, 7, dtype=torch.float64))


def test_backward_of_a_wrong_saved() -> None:
    """Called by hand, the backward operators check what they would read."""
    q = torch.randn(1, 9, 2, 3)
    out, _, saved = ops.latent_attention(q, q, q, None, None, None, None, None, True, False, True)
    with pytest.raises(ValueError, match="saved: got shape"):
        ops.latent_attention_backward(out, None, q, q, q, None, None, None, None, None, True, None, saved[:1])
    with pytest.raises(ValueError, match="grad_out: got shape"):
        ops.latent_attention_backward(out[:, :5], None, q, q, q, None, None, None, None, None, True, None, saved)
