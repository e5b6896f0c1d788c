"""The operators against their definitions, the fused kernels against float64, and a sequence against its pieces."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from ops_cases import CASES, TOLERANCE, Case, assert_close, attention, fresh_state, macchiato, meaning, normal, ops, state_dtype
from ops_cases import window as window_case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

FUSED = [torch.float32, torch.bfloat16, torch.float16]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2)


def define_latents(case: Case, causal: bool) -> Tensor:
    """p(s|t) of the latents, [B, T, H, L, S], from the definition."""
    q = case.inputs["query_logits"]
    k = repeat_heads(case.inputs["key_logits"], q.shape[2])
    batch, time, heads, latents = k.shape
    mask = case.rest.get("key_mask", torch.ones(batch, time, dtype=torch.bool))
    logits = k.permute(0, 2, 3, 1).unsqueeze(1).expand(batch, time, heads, latents, time)
    if "log_decay" in case.inputs:
        decay = repeat_heads(case.inputs["log_decay"], heads).masked_fill(~mask[:, :, None, None], 0.0).cumsum(1)
        logits = logits + decay.unsqueeze(-1) - decay.permute(0, 2, 3, 1).unsqueeze(1)
    readable = mask[:, None, None, None, :].expand_as(logits)
    if causal:
        readable = readable & torch.ones(time, time, dtype=torch.bool).tril()[None, :, None, None, :]
    return logits.masked_fill(~readable, -torch.inf).softmax(-1).nan_to_num(0.0)


def define_window(case: Case) -> Tensor:
    """What the window reads, [B, T, H, D], from the definition."""
    query = case.inputs["query"]
    key, values = (repeat_heads(case.inputs[name], query.shape[2]) for name in ("key", "values"))
    window, sinks, causal = (case.rest[name] for name in ("window", "sinks", "causal"))
    time = query.shape[1]
    t, s = torch.arange(time)[:, None], torch.arange(time)[None, :]
    inside = (s <= t) & (s > t - window) if causal else (t - s).abs() < window
    left = (s < sinks) & (s <= t - window) if causal else torch.zeros(time, time, dtype=torch.bool)
    scores = torch.einsum("bthd,bshd->bhts", query, key)
    if "sink_query" in case.inputs:
        scores = torch.where(left, torch.einsum("bthd,bshd->bhts", case.inputs["sink_query"], key), scores)
    mask = case.rest.get("key_mask", torch.ones(query.shape[:2], dtype=torch.bool))
    readable = (inside | left) & mask[:, None, None, :]
    weights = (scores * query.shape[-1] ** -0.5).masked_fill(~readable, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhts,bshd->bthd", weights, values)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("decay", [True, False])
def test_attention_is_its_definition(causal: bool, mask: bool, decay: bool) -> None:
    if decay and not causal:
        pytest.skip("forgetting is causal")
    case = attention(causal=causal, mask=mask, decay=decay, time=70)
    case.inputs["query_logits"][0, 3] = -torch.inf
    case.inputs["query_logits"][0, 4, :, 1] = -torch.inf
    case.inputs["key_logits"][1, :9, :, 2] = -torch.inf
    case.inputs["key_logits"][1, :, :, 3] = -torch.inf
    share = case.inputs["query_logits"].softmax(-1).nan_to_num(0.0)
    values = repeat_heads(case.inputs["values"], share.shape[2])
    expected = torch.einsum("bthl,bthls,bshd->bthd", share, define_latents(case, causal), values)
    for dtype in (torch.float64, torch.float32):
        assert_close(case(case.tensors(dtype))[0], expected, TOLERANCE[dtype], str(dtype))


@pytest.mark.parametrize(
    "options",
    [{}, {"sinks": 3}, {"sinks": 3, "sink_query": True, "mask": True}, {"window": 1}, {"window": 100, "sinks": 7},
     {"sinks": 60, "window": 2}, {"causal": False, "mask": True}, {"causal": False, "window": 100}],
)  # fmt: skip
def test_macchiato_is_its_definition(options: dict) -> None:
    case = macchiato(time=70, **options)
    share = case.inputs["query_logits"].softmax(-1)
    values = repeat_heads(case.inputs["values"], share.shape[2])
    latents = torch.einsum("bthl,bthls,bshd->bthd", share[..., 1:], define_latents(case, case.rest["causal"]), values)
    window = define_window(case)
    alone = window_case(time=70, **options)
    for dtype in (torch.float64, torch.float32):
        assert_close(case(case.tensors(dtype))[0], latents + share[..., :1] * window, TOLERANCE[dtype], str(dtype))
        assert_close(alone(alone.tensors(dtype))[0], window, TOLERANCE[dtype], f"the window alone, {dtype}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", FUSED)
def test_fused_is_float64(name: str, dtype: torch.dtype) -> None:
    """Outputs and every gradient, against float64 on the inputs as dtype rounds them."""
    case = CASES[name]()
    tensors = case.tensors(dtype, requires_grad=True)
    exact = {key: x.detach().double().requires_grad_() for key, x in tensors.items()}
    got, expected = case.readable(tensors), case.readable(exact)
    # Cotangents that every dtype holds exactly.
    cotangents = [normal(*x.shape, seed=90 + i).bfloat16().double() for i, x in enumerate(expected)]
    assert got[0].dtype == (dtype if case.inputs else state_dtype(dtype))
    without_gradients = case.readable(case.tensors(dtype))
    for i, (a, b, c) in enumerate(zip(got, expected, without_gradients, strict=True)):
        assert_close(a, b, TOLERANCE[dtype], f"output {i}")
        assert_close(c, b, TOLERANCE[dtype], f"output {i} without gradients")
    grads = torch.autograd.grad(got, list(tensors.values()), [c.to(x.dtype) for c, x in zip(cotangents, got, strict=True)])
    exact_grads = torch.autograd.grad(expected, list(exact.values()), cotangents)
    for key, a, b in zip(tensors, grads, exact_grads, strict=True):
        assert_close(a, b, TOLERANCE[dtype], f"gradient of {key}")


EXTREMES = ["huge", "offset", "rising", "falling", "jump", "absent", "decay", "decay-extreme"]
MIXTURES: dict[str, Callable[..., Case]] = {
    "causal": lambda **k: attention(state=True, **k),
    "bidirectional": lambda **k: attention(causal=False, **k),
    "macchiato": lambda **k: macchiato(sinks=3, sink_query=True, state=True, **k),
    "macchiato-bidirectional": lambda **k: macchiato(causal=False, **k),
}


def extreme(mixture: str, kind: str, tokens: int = 70) -> Case:
    """Logits, scores of the window and decays as the kernels' chunks like them least; of 70 tokens float16 holds them all."""
    case = MIXTURES[mixture](time=tokens, latents=3, **({"decay": True} if kind.startswith("decay") else {}))
    q, k = case.inputs["query_logits"], case.inputs["key_logits"]
    query, key = (case.inputs.get(name, torch.zeros(1, tokens, 1, 0)) for name in ("query", "key"))
    time = torch.arange(tokens).view(1, -1, 1, 1) - tokens / 2
    if kind == "huge":
        q.mul_(5000.0), k.mul_(5000.0), query.mul_(100.0), key.mul_(100.0)
    elif kind == "offset":
        q.sub_(1e4), k.add_(1e4)
    elif kind == "rising":
        k.add_(1000.0 * time)
        query.abs_().mul_(30.0), key.add_(30.0 * time)
    elif kind == "falling":
        k.sub_(1000.0 * time)
        query.abs_().mul_(30.0), key.sub_(30.0 * time)
    elif kind == "jump":
        k[:, 17:] += 1000.0
        k[:, 40:] -= 3000.0
        key[:, 17:] *= 1000.0
        key[:, 40:] *= -0.01
    elif kind == "absent":
        k[:, :20] = -torch.inf
        k[:, :, :, 1] = -torch.inf
        q[:, 5:9] = -torch.inf
        q[:, 60:, :, 0] = -torch.inf
        case.rest["key_mask"] = (time.flatten() > 0).expand(q.shape[0], -1)
    elif kind == "decay":
        case.inputs["log_decay"].mul_(30.0)
    elif kind == "decay-extreme":
        case.inputs["log_decay"][:, ::7] = -1e4
    return case


@pytest.mark.parametrize("dtype", FUSED, ids=str)
@pytest.mark.parametrize(
    ("mixture", "kind"), [(m, k) for m in MIXTURES for k in EXTREMES if "bidirectional" not in m or not k.startswith("decay")]
)
def test_extreme_logits(mixture: str, kind: str, dtype: torch.dtype) -> None:
    check_extreme(extreme(mixture, kind), dtype)


@pytest.mark.parametrize("dtype", FUSED, ids=str)
@pytest.mark.parametrize("kind", ["jump", "absent", "decay", "decay-extreme"])
@pytest.mark.parametrize("mixture", ["causal", "macchiato"])
def test_extreme_logits_of_several_segments(mixture: str, kind: str, dtype: torch.dtype) -> None:
    """More tokens than the kernels' backward pass takes at once, between a first and a last state that have gradients."""
    check_extreme(extreme(mixture, kind, tokens=600), dtype)


def check_extreme(case: Case, dtype: torch.dtype) -> None:
    """Outputs, states and every gradient, against the composed path in float64 on the inputs as dtype rounds them."""
    tensors = case.tensors(dtype, requires_grad=True)
    exact = {key: x.detach().double().requires_grad_() for key, x in tensors.items()}
    got, expected = case.readable(tensors), case.readable(exact)
    cotangents = [normal(*x.shape, seed=3 + i).bfloat16().double() for i, x in enumerate(expected)]
    # Logits are exact; a score of the window is a sum of products, whose error is that of a float32 of its size.
    score = 0.0
    if "query" in exact:
        score = (exact["query"].norm(dim=-1).max() * exact["key"].norm(dim=-1).max()).item() * exact["key"].shape[-1] ** -0.5
    tolerance = max(TOLERANCE[dtype], 1e-5 * score / 64)
    without_gradients = case.readable(case.tensors(dtype))
    for i, (a, b, c) in enumerate(zip(got, expected, without_gradients, strict=True)):
        assert_close(a, b, tolerance, f"output {i}")
        assert_close(c, b, tolerance, f"output {i} without gradients")
    grads = torch.autograd.grad(got, list(tensors.values()), [c.to(x.dtype) for c, x in zip(cotangents, got, strict=True)])
    exact_grads = torch.autograd.grad(expected, list(exact.values()), cotangents)
    for key, a, b in zip(tensors, grads, exact_grads, strict=True):
        assert_close(a, b, tolerance, f"gradient of {key}")


def pieces_of(case: Case, tensors: dict[str, Tensor], cuts: list[int], over_time: set[str]) -> list[list[Tensor]]:
    """The outputs of the pieces, each from the state of the one before."""
    results, state = [], None
    time = tensors["values" if "values" in tensors else "x"].shape[1]
    for begin, end in zip([0, *cuts], [*cuts, time], strict=True):
        rest = {name: x[:, begin:end] if name in over_time else x for name, x in case.rest.items()}
        arguments = {name: x[:, begin:end] if name in over_time else x for name, x in tensors.items()} | rest
        arguments |= {"output_final_state": True, "initial_state": state}
        out, state = getattr(ops, case.operator)(**arguments)
        results.append([out, state])
    return results


OVER_TIME = {"query_logits", "key_logits", "values", "log_decay", "key_mask", "query", "key", "sink_query", "x",
             "recurrence_logits", "input_logits"}  # fmt: skip


@pytest.mark.parametrize("cuts", [[16, 40], [1], [69], list(range(1, 70))], ids=["chunks", "first", "last", "steps"])
@pytest.mark.parametrize("dtype", [torch.float64, *FUSED])
@pytest.mark.parametrize("operator", ["causal_attention", "macchiato_attention", "window_attention"])
def test_whole_is_pieces(operator: str, dtype: torch.dtype, cuts: list[int]) -> None:
    if operator == "causal_attention":
        case = attention(time=70, decay=True, mask=True)
    else:
        options = {"time": 70, "sinks": 3, "sink_query": True, "mask": True, "window": 6}
        case = macchiato(decay=True, **options) if operator == "macchiato_attention" else window_case(**options)
    case.rest.pop("output_final_state", None)
    tensors = case.tensors(dtype)
    out, state = getattr(ops, operator)(**tensors, **case.rest, output_final_state=True)
    results = pieces_of(case, tensors, cuts, OVER_TIME)
    assert_close(torch.cat([r[0] for r in results], 1), out, TOLERANCE[dtype])
    for i, (a, b) in enumerate(zip(*([x] if isinstance(x, Tensor) else x for x in (results[-1][1], state)), strict=True)):
        if operator != "window_attention" and i == 0:
            a, b = meaning(a)[0], meaning(b)[0]
        if a.is_floating_point():
            # Of bfloat16 inputs kernels may round the weights of a sum to bfloat16; a single step doesn't.
            tolerance = {torch.float64: 1e-12, torch.bfloat16: 1e-4 + 2**-9}.get(dtype, 1e-4)
            assert_close(a, b, tolerance, f"state {i}")
        elif operator != "causal_attention":
            assert torch.equal(a, b), f"state {i}"


def test_pieces_carry_gradients() -> None:
    """The gradients of a sequence in pieces are those of the whole, through every tensor of the state."""
    for case, cuts in (
        (attention(time=70, decay=True, mask=True), [16, 17, 40]),
        (macchiato(time=70, sinks=3, sink_query=True, window=6, decay=True), [16, 17, 40]),
        (attention(time=600, decay=True, mask=True), [16, 17, 290]),  # pieces of more than a segment of the backward pass
        (macchiato(time=600, sinks=3, sink_query=True, window=6, decay=True), [16, 17, 290]),
    ):
        case.rest.pop("output_final_state", None)
        for dtype in (torch.float64, torch.float32):
            tensors = case.tensors(dtype, requires_grad=True)
            whole = getattr(ops, case.operator)(**tensors, **case.rest)[0]
            joined = torch.cat([r[0] for r in pieces_of(case, tensors, cuts, OVER_TIME)], 1)
            cotangent = normal(*whole.shape, seed=4).to(dtype)
            expected = torch.autograd.grad(whole, list(tensors.values()), cotangent)
            got = torch.autograd.grad(joined, list(tensors.values()), cotangent)
            for key, a, b in zip(tensors, got, expected, strict=True):
                assert_close(a, b, TOLERANCE[dtype], f"{case.operator}, gradient of {key}")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_whole_is_merged_pieces(dtype: torch.dtype) -> None:
    case = attention(time=70, decay=True, mask=True)
    case.rest.pop("output_final_state", None)
    tensors = case.tensors(dtype, requires_grad=True)
    whole = ops.causal_attention(**tensors, **case.rest, output_final_state=True)[1]
    states = []
    for begin, end in ((0, 16), (16, 17), (17, 70)):
        part = {name: x[:, begin:end] for name, x in tensors.items()}
        states.append(ops.causal_attention(**part, key_mask=case.rest["key_mask"][:, begin:end], output_final_state=True)[1])
    left = ops.merge_states(ops.merge_states(states[0], states[1]), states[2])
    right = ops.merge_states(states[0], ops.merge_states(states[1], states[2]))
    cotangents = [normal(*x.shape, seed=5 + i).to(dtype) for i, x in enumerate(meaning(whole))]
    expected = torch.autograd.grad(meaning(whole), list(tensors.values()), cotangents, allow_unused=True)
    for merged in (left, right):
        for a, b in zip(meaning(merged), meaning(whole), strict=True):
            assert_close(a, b, TOLERANCE[dtype])
        got = torch.autograd.grad(meaning(merged), list(tensors.values()), cotangents, retain_graph=True, allow_unused=True)
        for key, a, b in zip(tensors, got, expected, strict=True):
            if b is not None and key != "query_logits":
                assert_close(a, b, TOLERANCE[dtype], f"gradient of {key}")
    empty = fresh_state(2, 2, 5, 6).to(state_dtype(dtype))
    for merged in (ops.merge_states(empty, whole), ops.merge_states(whole, empty)):
        assert_close(merged, whole, TOLERANCE[dtype])
    assert torch.equal(ops.merge_states(empty, empty), empty)


class CoreCalls(TorchDispatchMode):
    """Keeps the calls of latte's operators below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        if func.namespace == "latte":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


# What reads the tokens that a state has seen from its tensor can't be run on tensors without data, nor can packed sequences.
WITHOUT_DATA = [name for name in CASES if not name.endswith(("packed", "macchiato-state", "window-state"))]


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_the_composed_path_stays_on_another_device(name: str, requires_grad: bool) -> None:
    """Every forward pass on tensors that say that they are a GPU's: an operand of the CPU's would be an error."""
    case = CASES[name]()
    with CoreCalls() as core:
        case.readable(case.tensors(torch.float32, requires_grad=requires_grad))
    composed = "CompositeExplicitAutograd"
    ran = 0
    for func, args, kwargs in core.calls:
        has_composed = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composed)
        if not has_composed or func is ops.window_state.default:
            continue
        real = func(*args, **kwargs)
        with FakeTensorMode():
            moved = tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"), (args, kwargs))
            got = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *moved[0], **moved[1])
        for a, b in zip(*([x] if isinstance(x, Tensor) else x for x in (got, real)), strict=True):
            assert (a.device.type, a.shape, a.dtype) == ("cuda", b.shape, b.dtype), func
        ran += 1
    assert ran > 0 or name in ("linear", "merge")  # made of torch's operators there, or with gradients


def test_merge_states_has_a_kernel() -> None:
    """In float32 without gradients, of any strides and under torch.compile; torch.func.vmap goes through torch's operators."""
    exact = CASES["merge"]().states
    exact["right"][1, 0, 1, -1] = -torch.inf  # all is forgotten
    left, right = exact["left"].float(), exact["right"].float()
    expected = ops.merge_states(**exact)
    with torch.profiler.profile() as profile:
        merged = ops.merge_states(left, right)
    names = {event.name for event in profile.events()}
    assert "latte::merge_states" in names and "aten::exp" not in names
    assert_close(merged, expected, 1e-6)
    followed = ops.merge_states(left.clone().requires_grad_(), right)
    assert followed.requires_grad
    assert_close(followed, expected, 1e-6)
    strided = [x.transpose(0, 3).contiguous().transpose(0, 3) for x in (left, right)]
    assert torch.equal(ops.merge_states(*strided), merged)
    assert torch.equal(torch.compile(ops.merge_states, fullgraph=True, backend="aot_eager")(left, right), merged)
    several = torch.stack([left, right]), torch.stack([right, left])
    for got, pair in zip(torch.func.vmap(ops.merge_states)(*several), zip(*several, strict=True), strict=True):
        assert_close(got, ops.merge_states(*(x.double() for x in pair)), 1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("packed")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_is_separate(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    tensors = case.tensors(dtype)
    ends = case.rest["cu_seqlens"].tolist()
    packed = case(tensors)
    separate = []
    states = {*case.states, *case.caches} - {"weight", "bias", "lambda_"}
    for n, (begin, end) in enumerate(pairwise(ends)):
        one = Case(case.operator, case.inputs, case.states, dict(case.rest), case.caches)
        del one.rest["cu_seqlens"]
        for key, x in one.rest.items():
            if key == "key_mask":
                one.rest[key] = x[:, begin:end]
            elif isinstance(x, Tensor):
                one.rest[key] = x[n : n + 1]
        part = {}
        for key, x in tensors.items():
            part[key] = x[n : n + 1] if key in states else x[:, begin:end] if key in OVER_TIME else x
        arguments = one(part) if end > begin else None
        separate.append(arguments)
    kept = [n for n in range(len(separate)) if separate[n] is not None]
    assert_close(torch.cat([separate[n][0] for n in kept], 1), packed[0], TOLERANCE[dtype])
    for i in range(1, len(packed)):
        for n in kept:
            a, b = separate[n][i], packed[i][n : n + 1]
            assert torch.equal(a, b) if not a.is_floating_point() else assert_close(a, b, TOLERANCE[dtype], f"state {i}") is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_to_read(dtype: torch.dtype) -> None:
    for case in (attention(time=0, state=True), macchiato(time=0, state=True, sinks=2), attention(batch=0, time=5, state=True),
                 macchiato(batch=0, time=5, state=True)):  # fmt: skip
        tensors = case.tensors(dtype, requires_grad=True)
        arguments = {key: x for key, x in tensors.items() if key in case.inputs}
        result = case(tensors)
        grads = torch.autograd.grad([x.sum() for x in result if x.requires_grad], list(tensors.values()), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)
        out = getattr(ops, case.operator)(**arguments, **{k: v for k, v in case.rest.items() if k in ("window", "sinks")})[0]
        assert out.numel() == 0 and out.shape[:2] == tensors["values"].shape[:2]
    before = attention(time=0, state=True).tensors(dtype)
    out, state = ops.causal_attention(**before, output_final_state=True)
    assert torch.equal(state, before["initial_state"])


def test_nothing_is_written_to_the_inputs() -> None:
    for name in CASES:
        case = CASES[name]()
        tensors = case.tensors(torch.float32, requires_grad=True)
        before = {key: x.detach().clone() for key, x in tensors.items()}
        outputs = [x for x in case(tensors) if x.requires_grad]
        torch.autograd.grad([x.sum() for x in outputs], list(tensors.values()))
        assert all(torch.equal(before[key], x) for key, x in tensors.items()), name


@pytest.mark.parametrize("name", ["causal-mask-state", "macchiato-state", "convolution-state", "recurrence-state"])
def test_any_strides(name: str) -> None:
    """Transposed, sliced and expanded inputs, and a gradient of stride 0, give what contiguous ones do."""
    case = CASES[name]()
    tensors = case.tensors(torch.float32, requires_grad=True)
    strided = {}
    for key, x in tensors.items():
        y = torch.stack([x.detach(), x.detach()], -1)[..., 0]
        y = y if x.dim() == 1 else y.transpose(0, 1).contiguous().transpose(0, 1) if len(strided) % 2 else y
        assert not y.is_contiguous()
        strided[key] = y.requires_grad_()
    got, expected = case(strided), case(tensors)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    grads = torch.autograd.grad(got[0].sum(), list(strided.values()), allow_unused=True)
    exact = torch.autograd.grad((expected[0] * torch.ones_like(expected[0])).sum(), list(tensors.values()), allow_unused=True)
    for key, a, b in zip(tensors, grads, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, 1e-6, key)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("vapor", "merge"))])
def test_autocast(name: str) -> None:
    """Inputs go to bfloat16, states stay float32; gradients come back in float32."""
    case = CASES[name]()
    tensors = case.tensors(torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case(tensors)
        plain = case(tensors | {"initial_state": None} if "initial_state" in tensors else tensors)[0]
    assert outputs[0].dtype == plain.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in outputs[1:2] if case.operator != "window_attention")
    rounded = case({key: x.bfloat16() if key in case.inputs or key in case.caches else x for key, x in tensors.items()})
    for a, b in zip(outputs, rounded, strict=True):
        assert torch.equal(a, b)
    for grad in torch.autograd.grad(outputs[0].float().sum(), list(tensors.values()), allow_unused=True):
        assert grad is None or (grad.dtype == torch.float32 and grad.isfinite().all())


@pytest.mark.parametrize("packed, time", [(True, 2), (True, 6), (True, 37), (False, 0), (False, 2), (False, 6), (False, 37)])
def test_caches_are_the_same_with_and_without_gradients(packed: bool, time: int) -> None:
    """Copied by a kernel where nothing is to be differentiated, by torch's own operators where something is."""
    for state in (True, False):
        case = macchiato(time=time, packed=packed, state=state, sinks=7, window=9, mask=True)
        case.rest["output_final_state"] = True
        for dtype in (torch.float64, torch.bfloat16):
            fast, slow = case(case.tensors(dtype)), case(case.tensors(dtype, requires_grad=True))
            assert len(fast) == len(slow)
            for a, b in zip(fast[2:], slow[2:], strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)


def test_inference_keeps_states_float32() -> None:
    for dtype in FUSED:
        case = attention(state=True)
        with torch.inference_mode():
            out, state = case(case.tensors(dtype))
        assert out.dtype == dtype and state.dtype == state_dtype(dtype)
