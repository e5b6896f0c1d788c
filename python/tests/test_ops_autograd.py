"""Derivatives against finite differences in float64, and what torch.library.opcheck and torch.compile ask of an operator."""

from __future__ import annotations

from collections.abc import Iterator

import latte
import pytest
import torch
from functorch.compile import make_boxed_func
from ops_cases import CASES, TOLERANCE, Case, assert_close, normal, ops, some_state, state_dtype
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck


def followed(case: Case):
    """The case as a function of its tensors."""
    tensors = case.tensors(torch.float64, requires_grad=True)
    names = list(tensors)
    return lambda *values: tuple(case.readable(dict(zip(names, values, strict=True)))), tuple(tensors.values())


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    function, inputs = followed(CASES[name]())
    assert gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["causal-packed", "bidirectional", "macchiato-state", "convolution-packed", "recurrence-state"])
def test_gradcheck_of_every_element(name: str) -> None:
    """Not only of random directions, on one chunk."""
    small = {"time": 5, "heads": 2, "kv_heads": 1, "latents": 2, "head_dim": 2} if name[0] in "bm" or "causal" in name else {}
    function, inputs = followed(CASES[name](**small))
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name: str) -> None:
    function, inputs = followed(CASES[name]())
    assert gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)


def test_merge_states_gradcheck() -> None:
    left, right = (some_state(2, 2, 3, 4, seed).requires_grad_() for seed in (60, 70))

    def function(left, right):
        state = ops.merge_states(left, right)
        seen = state[..., -3] > 0
        scale = torch.where(seen, state[..., -2], 0.0).exp().unsqueeze(-1)
        return state[..., :-2] * scale, state[..., -1]

    assert gradcheck(function, (left, right))
    assert gradgradcheck(function, (left, right))


MASKED = [name for name in CASES if "key_mask" in CASES[name]().rest]
# What a masked token holds of keys and values; its query may be anything to itself.
SILENCED = ("key_logits", "values", "key", "x", "recurrence_logits", "input_logits", "log_decay")


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MASKED)
def test_masked_tokens_add_nothing_whatever_they_hold(name: str, dtype: torch.dtype, create_graph: bool) -> None:
    case = CASES[name]()
    masked = ~case.rest["key_mask"]
    results = []
    for held in (0.0, torch.nan):
        tensors = case.tensors(dtype)
        for key in SILENCED:
            if key in tensors:
                tensors[key] = torch.where(masked.reshape(*masked.shape, *[1] * (tensors[key].dim() - 2)), held, tensors[key])
        tensors = {key: x.requires_grad_() for key, x in tensors.items()}
        # Without the tokens that a window's state remembers as they came.
        count = 1 if case.operator == "window_attention" else 3
        outputs = [x for x in case.readable(tensors)[:count] if x.requires_grad]
        rows = [x[~masked] if x.shape[:2] == masked.shape else x for x in outputs]
        grads = torch.autograd.grad(
            sum(x.sum() for x in rows), list(tensors.values()), create_graph=create_graph, materialize_grads=True
        )
        results.append([*rows, *grads])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(b, a, 1e-6, f"{name}, {i}")


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["causal-decay", "causal-packed", "macchiato-state"])
def test_a_decay_of_minus_infinity_forgets_everything(name: str, create_graph: bool) -> None:
    """Also where a latent then reads nothing more (its key logits are -inf)."""
    case = CASES[name]()
    case.inputs["log_decay"][:, 10] = -torch.inf
    case.inputs["log_decay"][:, 25, 0] = -torch.inf
    case.inputs["key_logits"][:, 25:, 0, 1] = -torch.inf
    results = []
    for dtype in (torch.float32, torch.float64):
        tensors = case.tensors(dtype, requires_grad=True)
        outputs = case.readable(tensors)
        finite = sum(torch.where(x.isfinite(), x, 0).sum() for x in outputs)
        grads = torch.autograd.grad(finite, list(tensors.values()), create_graph=create_graph)
        results.append([*outputs, *grads])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(a, b, 1e-5, f"{name}, {i}")
    # Nothing from before token 10 is read from there on.
    out = case({key: x.double() for key, x in case.tensors(torch.float64).items()})[0]
    if name == "causal-decay":
        case.inputs["values"][:, :10] += 1.0
        assert_close(case(case.tensors(torch.float64))[0][:, 10:], out[:, 10:], 1e-12)


@pytest.mark.parametrize("name", ["causal-mask-state", "macchiato-state", "recurrence-state"])
def test_double_backward_in_float32(name: str) -> None:
    """The fused kernels' second derivative is the composed path's."""
    case = CASES[name]()
    results = []
    for dtype in (torch.float32, torch.float64):
        tensors = case.tensors(dtype, requires_grad=True)
        out = case(tensors)[0]
        grads = torch.autograd.grad(out, list(tensors.values()), normal(*out.shape, seed=5).to(dtype), create_graph=True,
                                    allow_unused=True)  # fmt: skip
        penalty = sum((g * g).sum() for g in grads if g is not None)
        results.append(torch.autograd.grad(penalty, list(tensors.values()), allow_unused=True))
    for key, a, b in zip(tensors, *results, strict=True):
        assert (a is None) == (b is None), key
        if a is not None:
            assert_close(a, b, 1e-4, key)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES]
    + [(name, dtype) for name in ("causal-mask-state", "macchiato-packed", "convolution-packed", "recurrence-packed", "vapor")
       for dtype in (torch.bfloat16, torch.float64)],
)  # fmt: skip
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    arguments = case.arguments(case.tensors(dtype, requires_grad=True))
    operator = getattr(ops, case.operator).default
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    positional = [arguments.pop(a.name) for a in operator._schema.arguments if a.name in arguments and not a.kwarg_only]
    opcheck(operator, tuple(positional), arguments, **tolerance)


def core_calls(dtype: torch.dtype) -> Iterator[tuple[torch._ops.OpOverload, tuple]]:
    """Calls of the operators that the public ones are made of, their backward passes included."""
    q, k, v = (normal(2, 9, *s, seed=i).to(dtype) for i, s in enumerate(((4, 3), (2, 3), (2, 5))))
    for causal in (True, False):
        inputs = (q, k, v, None, -k.abs() if causal else None, None, None, None, causal)
        yield ops.latent_attention.default, (*inputs, causal, True)
        out, state, saved = ops.latent_attention(*inputs, causal, True)
        state = state if causal else None
        yield ops.latent_attention_backward.default, (torch.ones_like(out), state, *inputs, state, saved)
    query, key = (normal(2, 9, h, 6, seed=5 + h).to(dtype) for h in (4, 2))
    inputs = (query, key, v, *[None] * 10, 4, 2, 0.5, True)
    yield ops.window_attention_core.default, (*inputs, True)
    out, lse = ops.window_attention_core(*inputs, True)
    yield ops.window_attention_core_backward.default, (torch.ones_like(out), out, lse, *inputs)
    past = (torch.tensor([1, 7]), *(normal(2, 4, 2, n, seed=n).to(dtype) for n in (6, 5)), torch.ones(2, 4) > 0)
    sinks = (*(normal(2, 2, 2, n, seed=20 + n).to(dtype) for n in (6, 5)), torch.ones(2, 2) > 0)
    yield ops.window_state.default, (query, key, v, None, *past, *sinks, None, 4, 2)
    gated, state = normal(2, 9, 4, 4, seed=12).to(dtype), normal(2, 2, 3, 8, seed=13).abs().to(state_dtype(dtype))
    yield ops.macchiato_attention_core.default, (query, key, v, gated, k, None, -k.abs(), None, state, *past, *sinks, None,
                                                 4, 2, 0.5, True, True)  # fmt: skip
    for grad in (False, True):
        inputs = [x.clone().requires_grad_(grad) for x in (query, key, v, gated, k)]
        yield ops.macchiato_attention_core.default, (*inputs, *[None] * 12, 4, 0, 0.5, False, False)
    yield ops.window_state.default, (query, key, v, *[None] * 9, 4, 2)
    x = normal(2, 9, 5, seed=8).to(dtype)
    wide = state_dtype(dtype)
    weight, bias, lambda_ = normal(5, 3, seed=9).to(wide), normal(5, seed=10).to(wide), normal(5, seed=11).to(wide)
    yield ops.causal_conv1d_core.default, (x, weight, bias, None, None, None, True)
    yield ops.causal_conv1d_core_backward.default, (x, None, x, weight, bias, None, None, None)
    yield ops.rg_lru_core.default, (x, x, x, lambda_, None, None, None, True, True)
    hidden = ops.rg_lru_core(x, x, x, lambda_, None, None, None, True, True)[2]
    yield ops.rg_lru_core_backward.default, (x, None, hidden, x, x, x, lambda_, None, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_of_the_core(dtype: torch.dtype) -> None:
    for operator, arguments in core_calls(dtype):
        opcheck(operator, arguments)


def test_every_operator_has_a_case() -> None:
    """Of all that the library registers: opcheck sees it, and what is public is compiled as well."""
    registered = {name.removeprefix("latte::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("latte::")}
    public = {case().operator for case in CASES.values()}
    core = {operator.name().removeprefix("latte::") for operator, _ in core_calls(torch.float32)}
    assert registered == public | core
    assert {name for name in latte.__all__ if hasattr(ops, name)} <= public


def check_compiled(name: str, **options) -> None:
    """fullgraph, forward and backward, against the same without a compiler."""
    torch._dynamo.reset()
    case = CASES[name]()
    tensors = case.tensors(torch.float32, requires_grad=True)
    compiled = torch.compile(case, fullgraph=True, **options)
    got, expected = compiled(tensors), case(tensors)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    finite = [[x[x.isfinite()] for x in outputs if x.requires_grad] for outputs in (got, expected)]
    sums = [[(x * x.detach().cos()).sum() for x in outputs] for outputs in finite]
    grads = [torch.autograd.grad(s, list(tensors.values()), allow_unused=True) for s in sums]
    for key, a, b in zip(tensors, *grads, strict=True):
        a, b = (torch.zeros_like(tensors[key]) if g is None else g for g in (a, b))
        assert_close(a, b, TOLERANCE[torch.float32], f"gradient of {key}")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name != "vapor-positions"])
def test_compile(name: str, dynamic: bool) -> None:
    """aot_eager compiles the same graphs as inductor, without its C++ compiler."""
    check_compiled(name, dynamic=dynamic, backend="aot_eager")


@pytest.mark.parametrize("name", ["causal-mask-state", "macchiato-state", "macchiato-packed"])
def test_compile_without_gradients(name: str) -> None:
    """Macchiato is one operator then."""
    torch._dynamo.reset()
    case = CASES[name]()
    tensors = case.tensors(torch.float32)
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    got, expected = torch.compile(case, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(tensors), case(tensors)
    assert ("macchiato_attention_core" in graphs[0]) == name.startswith("macchiato")
    assert "window_attention_core" not in graphs[0]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("name", ["causal-mask-state", "macchiato-sinks", "recurrence-state"])
def test_compile_with_inductor(name: str) -> None:
    """The backend that torch.compile takes by itself."""
    check_compiled(name, backend="inductor")


def test_compile_of_several_lengths() -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda q, k, v: ops.causal_attention(q, k, v, output_final_state=True), fullgraph=True,
                             dynamic=True, backend="aot_eager")  # fmt: skip
    for time in (5, 300, 513, 7):
        q, k, v = (normal(2, time, *s, seed=time).float().requires_grad_() for s in ((4, 3), (2, 3), (2, 5)))
        got, expected = function(q, k, v), ops.causal_attention(q, k, v, output_final_state=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        got[0].sum().backward()
