"""latte::linear is torch.nn.functional.linear, whichever library multiplies."""

import copy

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
    for a, b, inner in zip(ours, theirs, (257, out[..., 0].numel(), out[..., 0].numel()), strict=False):
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


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_multiply(shape):
    x, weight, bias = torch.zeros(shape), torch.ones(4, shape[1]), torch.arange(4.0)
    assert torch.equal(torch.ops.latte.linear(x, weight, bias), F.linear(x, weight, bias))
