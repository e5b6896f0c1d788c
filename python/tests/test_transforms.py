"""Forward mode and torch.func's transforms through the operators: right, never silently zero."""

import latte
import pytest
import torch
from torch.autograd import forward_ad

B, T, H, L, D = 1, 9, 2, 3, 4


def draw(*shape, dtype):
    return torch.randn(*shape, dtype=dtype)


def macchiato(x):
    window = x.new_zeros(B, T, H, 1)
    out, state = latte.macchiato_attention(
        x, x, x, torch.cat([window, x[..., :L]], -1), x[..., :L], window=3, output_final_state=True
    )
    return out.sum(-1) + state.keys.sum()


def averages(state):
    """What a state says; S and z alone are relative to the running maximum."""
    return state[..., :D] / state[..., D : D + 1]


def merged(x):
    left, right = (latte.causal_attention(y[..., :L], y[..., :L], y, output_final_state=True)[1] for y in (x, 2 * x))
    return averages(latte.merge_states(left, right))


FUNCTIONS = {
    "causal": lambda x: latte.causal_attention(x[..., :L], x[..., :L], x, log_decay=-x[..., :L].square())[0],
    "state": lambda x: averages(latte.causal_attention(x[..., :L], x[..., :L], x, output_final_state=True)[1]),
    "merged": merged,
    "bidirectional": lambda x: latte.bidirectional_attention(x[..., :L], x[..., :L], x),
    "macchiato": macchiato,
    "conv": lambda x: latte.causal_conv1d(x.flatten(2), x[0, 0].reshape(H * D, 1).expand(-1, 3))[0],
    "rg_lru": lambda x: latte.rg_lru(x.flatten(2), x.flatten(2), x.flatten(2), x[0, 0].flatten())[0],
    "vapor": latte.vapor,
    "linear": lambda x: torch.ops.latte.linear(x.expand(200, T, H, D), torch.cat([x[0, :, 0]] * 30), None),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode(name, dtype):
    """The directional derivative, both ways of asking for it, against central differences in float64."""
    function = FUNCTIONS[name]
    x, tangent = draw(B, T, H, D, dtype=dtype), draw(B, T, H, D, dtype=dtype)
    step, x64, tangent64 = 1e-5, x.double(), tangent.double()
    wanted = (function(x64 + step * tangent64) - function(x64 - step * tangent64)) / (2 * step)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-4
    _, through_func = torch.func.jvp(function, (x,), (tangent,))
    with forward_ad.dual_level():
        through_dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    for got in (through_func, through_dual):
        assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", [torch.float64, *HALF])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_func_grad(name, dtype):
    """The composed path, which other devices take too: half precision against float64 on the same numbers."""
    function = FUNCTIONS[name]
    x = draw(B, T, H, D, dtype=dtype)
    weights = torch.randn_like(function(x)).double()
    followed = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad((function(followed) * weights).sum(), followed)
    got = torch.func.grad(lambda y: (function(y) * weights).sum())(x)
    assert got.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(got, wanted)
    else:
        assert (got.double() - wanted).norm() <= HALF[dtype] * wanted.norm()


def test_module_with_trained_weights():
    module = latte.LatteAttention(8, 2, batch_first=True)
    x, tangent = torch.randn(2, T, 8), torch.randn(2, T, 8)
    _, got = torch.func.jvp(lambda y: module(y, is_causal=True)[0], (x,), (tangent,))
    exact = latte.LatteAttention(8, 2, batch_first=True, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    step = 1e-5
    with torch.no_grad():
        ends = [exact(x.double() + s * tangent.double(), is_causal=True)[0] for s in (step, -step)]
    wanted = (ends[0] - ends[1]) / (2 * step)
    assert (got.double() - wanted).norm() <= 1e-4 * wanted.norm()
