"""latte::linear is torch.nn.functional.linear, whichever library multiplies."""

import copy
from pathlib import Path

import pytest
import torch
from latte._linear import Linear
from torch.nn import functional as F

SHAPES = [(3, 4), (1, 300), (2, 150, 300), (700, 300)]  # of x, without its last dimension: small ones stay on torch's own path


def draw(shape, inner, outer, bias, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(*shape, inner, dtype=dtype, requires_grad=True)
    weight = torch.randn(outer, inner, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(outer, dtype=dtype, requires_grad=True) if bias else None


def close(ours, theirs, inner):
    """To the rounding of sums of `inner` products."""
    theirs = theirs.double()
    bound = 4 * torch.finfo(torch.float32).eps * inner**0.5 * theirs.norm() + 1e-30
    assert (ours.double() - theirs).norm() <= bound


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape, bias):
    inputs = list(draw(shape, 129, 257, bias))
    given = [x for x in inputs if x is not None]
    exact = [x.detach().double().requires_grad_() for x in given]
    out, wanted = torch.ops.latte.linear(*given), F.linear(*exact)
    close(out, wanted, 129)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, given, grad)
    theirs = torch.autograd.grad(wanted, exact, grad.double())
    rows = out[..., 0].numel()
    for a, b, inner in zip(ours, theirs, (257, rows, rows)[: len(given)], strict=True):
        close(a, b, inner)


def test_takes_any_strides():
    x, weight, bias = draw((129,), 700, 257, True)
    strided = [x.detach().t().contiguous().t(), weight.detach().t().contiguous().t(), bias.detach()]
    close(torch.ops.latte.linear(*strided), F.linear(*(y.double() for y in strided)), 700)
    expanded = torch.ones(1, 1).expand(700, 257)
    y = torch.ops.latte.linear(x.detach().t()[:, :129], weight[:, :129], bias)
    (grad,) = torch.autograd.grad(y, weight, torch.ones(1, 1).expand_as(y))
    close(grad[:, :129], (expanded[:, :1].double() * x.detach().t()).sum(0).expand(257, 129), 700)


def test_gradients_only_where_asked():
    x, weight, _ = draw((700,), 129, 257, False)
    (grad,) = torch.autograd.grad(torch.ops.latte.linear(x.detach(), weight).sum(), weight)
    close(grad, x.detach().double().sum(0).expand(257, 129), 700)
    with torch.no_grad():
        assert not torch.ops.latte.linear(x, weight).requires_grad


def test_second_derivative():
    x, weight, bias = draw((700,), 129, 257, True)
    (first,) = torch.autograd.grad(torch.ops.latte.linear(x, weight, bias).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    exact = [y.detach().double().requires_grad_() for y in (x, weight, bias)]
    (wanted,) = torch.autograd.grad(F.linear(*exact).pow(2).sum(), exact[0], create_graph=True)
    (wanted,) = torch.autograd.grad(wanted.sum(), exact[1])
    close(second, wanted, 700 * 16)


def test_autocast_takes_bfloat16():
    x, weight, bias = draw((700,), 129, 257, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.ops.latte.linear(x, weight, bias), F.linear(x, weight, bias))


def test_compiles_and_maps():
    module = Linear(129, 257)
    x = torch.randn(700, 129)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    close(compiled(x), module(x).detach(), 129)
    mapped = torch.func.vmap(module)(x.expand(2, 700, 129))
    close(mapped[1], module(x).detach(), 129)
    (grad,) = torch.func.grad(lambda w: torch.ops.latte.linear(x, w).sum(), argnums=(0,))(module.weight.detach())
    close(grad, x.double().sum(0).expand(257, 129), 700)


def test_wrong_shapes_are_torchs_errors():
    with pytest.raises(RuntimeError):
        torch.ops.latte.linear(torch.randn(700, 128), torch.randn(257, 129))
    with pytest.raises(RuntimeError):
        torch.ops.latte.linear(torch.randn(700, 129), torch.randn(257, 129), torch.randn(3))


def test_no_element():
    for rows, inner, outer in ((0, 300, 300), (4000, 0, 300), (4000, 300, 0)):
        x, weight = torch.randn(rows, inner, requires_grad=True), torch.randn(outer, inner, requires_grad=True)
        out = torch.ops.latte.linear(x, weight)
        assert torch.equal(out, F.linear(x, weight))
        out.sum().backward()
        assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


def saved_elements(function):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        out = function()
    return out, sizes


def test_keeps_what_gradients_need():
    x, weight, bias = draw((700,), 129, 257, True)
    out, sizes = saved_elements(lambda: torch.ops.latte.linear(x, weight.detach(), bias.detach()))
    assert sum(sizes) == weight.numel()
    out.sum().backward()
    _, sizes = saved_elements(lambda: torch.ops.latte.linear(x.detach(), weight, bias))
    assert sum(sizes) == x.numel()


def test_frozen_weight_lets_inputs_change():
    x, weight, _ = draw((700,), 129, 257, False)
    hidden = x * 1.0
    out = torch.ops.latte.linear(hidden, weight.detach())
    hidden.zero_()
    out.sum().backward()
    close(x.grad, weight.detach().double().sum(0).expand(700, 129), 257)


def test_batched_gradients():
    x, weight, bias = draw((2, 350), 129, 257, True)
    out = torch.ops.latte.linear(x, weight, bias)
    grads = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, (x, weight, bias), grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for a, b in zip(together, torch.autograd.grad(out, (x, weight, bias), grad, retain_graph=True), strict=True):
            close(a[i], b, 700)


def test_meta_and_inference():
    x, weight, _ = draw((700,), 129, 257, False)
    assert torch.ops.latte.linear(x.to("meta"), weight.to("meta")).shape == (700, 257)
    with torch.inference_mode():
        close(torch.ops.latte.linear(x, weight), F.linear(x, weight), 129)


def test_takes_onednn_where_it_gains():
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    if "avx512f" not in text or "GenuineIntel" in text:
        pytest.skip("torch's own path is as fast on this processor")
    x, weight, _ = draw((700,), 129, 257, False)
    with torch.profiler.profile() as profile:
        torch.ops.latte.linear(x, weight).sum().backward()
    assert sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events()) == 3
