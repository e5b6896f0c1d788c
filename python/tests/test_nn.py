"""LatteAttention and MacchiatoAttention: MultiheadAttention's habits, states, probabilities, torch.compile."""

import copy
import io

import latte
import pytest
import torch
from helpers import EMBED_DIM, NUM_HEADS, VARIANTS, assert_close, is_causal_only, make, padding, tokens
from latte import LatteAttention, MacchiatoAttention

every_variant = pytest.mark.parametrize("name", VARIANTS)
both_ways = [(name, causal) for name in VARIANTS for causal in (True, False) if causal or not is_causal_only(name)]
every_variant_both_ways = pytest.mark.parametrize("name, causal", both_ways)
CONTRACT = {
    "query_logits_proj.weight": (20, 16),
    "query_logits_proj.bias": (20,),
    "key_logits_proj.weight": (10, 16),
    "key_logits_proj.bias": (10,),
    "value_proj.weight": (8, 16),
    "value_proj.bias": (8,),
    "out_proj.weight": (16, 16),
    "out_proj.bias": (16,),
}


@every_variant_both_ways
def test_layouts_agree(name, causal):
    module, x = make(name), tokens()
    out, weights = module(x, x, x, is_causal=causal)
    assert weights is None
    time_first = make(name, batch_first=False)
    assert_close(time_first(x.transpose(0, 1), is_causal=causal)[0].transpose(0, 1), out)
    assert_close(module(x[1], is_causal=causal)[0], out[1])  # without a batch
    assert_close(time_first(x[1], is_causal=causal)[0], out[1])


@every_variant_both_ways
def test_probabilities_reproduce_the_output(name, causal):
    module, x, ignored = make(name), tokens(), padding()
    ignored[1, 0] = True  # a causal first token that may read nothing
    plain, _ = module(x, key_padding_mask=ignored, is_causal=causal)
    out, weights = module(x, key_padding_mask=ignored, is_causal=causal, need_weights=True, average_attn_weights=False)
    assert torch.equal(out, plain)
    assert weights.shape == (2, NUM_HEADS, 11, 11) and weights.dtype == x.dtype
    assert (weights >= 0).all()
    assert (weights.transpose(-1, -2)[1, :, ignored[1]] == 0).all()
    # Where the latents or the window have read nothing their share isn't redistributed: rows sum to one where all have read.
    assert_close(weights[0].sum(-1), torch.ones(NUM_HEADS, 11, dtype=x.dtype))
    assert (weights.sum(-1) <= 1 + 1e-12).all()
    if causal:
        assert (weights.triu(1) == 0).all()
        assert (weights[1, :, 0] == 0).all()
    if "vapor" not in name:
        assert_close(module.out_proj((weights @ heads_of(module, x)).transpose(1, 2).flatten(-2)), out)
    averaged = module(x, key_padding_mask=ignored, is_causal=causal, need_weights=True)[1]
    assert_close(averaged, weights.mean(1))
    assert module(x[0], is_causal=causal, need_weights=True)[1].shape == (11, 11)


@pytest.mark.parametrize("causal", [True, False])
def test_vapor_rotates_the_latents_values_by_distance_and_leaves_the_windows(causal):
    for name in ("latte-vapor", "macchiato-vapor"):
        module, x = make(name), tokens()
        out = module(x, is_causal=causal)[0]
        latents = module(x, is_causal=causal, need_weights=True, average_attn_weights=False)[1]
        values = module.value_proj(x).unflatten(-1, (NUM_HEADS, -1))
        heads = 0
        if name == "macchiato-vapor":
            apart = copy.deepcopy(module)  # with the gate wide open p(s|t) is the window's alone
            with torch.no_grad():
                apart.query_logits_proj.bias.view(NUM_HEADS, -1)[:, 0] += 1e4
            local = apart(x, is_causal=causal, need_weights=True, average_attn_weights=False)[1]
            gate = module.query_logits_proj(x).unflatten(-1, (NUM_HEADS, -1)).softmax(-1)[..., :1].transpose(1, 2)
            heads = (gate * local) @ values.transpose(1, 2)
            latents = latents - gate * local
        rotated = latents @ latte.vapor(values).transpose(1, 2)
        heads = heads + latte.vapor(rotated.transpose(1, 2), inverse=True).transpose(1, 2)
        assert_close(module.out_proj(heads.transpose(1, 2).flatten(-2)), out)


@every_variant
def test_causal_reads_no_later_token_and_bidirectional_does(name):
    module, x = make(name), tokens()
    changed = x.clone()
    changed[:, 6:] += 1
    assert_close(module(changed, is_causal=True)[0][:, :6], module(x, is_causal=True)[0][:, :6])
    if not is_causal_only(name):
        difference = module(changed)[0][:, :4] - module(x)[0][:, :4]
        assert difference.norm() > 1e-3


@every_variant_both_ways
def test_padding_does_not_reach_other_tokens(name, causal):
    module, x, ignored = make(name), tokens(), padding()
    out = module(x, key_padding_mask=ignored, is_causal=causal)[0]
    changed = torch.where(ignored[..., None], x + 3, x)
    assert_close(module(changed, key_padding_mask=ignored, is_causal=causal)[0][~ignored], out[~ignored])
    floats = torch.zeros(ignored.shape, dtype=x.dtype).masked_fill(ignored, -torch.inf)
    assert torch.equal(module(x, key_padding_mask=floats, is_causal=causal)[0], out)
    assert_close(module(x[1], key_padding_mask=ignored[1], is_causal=causal)[0], out[1])
    # Padding at the end alone leaves what there would be without it.
    end = padding()
    end[:, 2] = False
    assert_close(module(x, key_padding_mask=end, is_causal=causal)[0][1, :7], module(x[1, :7], is_causal=causal)[0])


def float_padding(dtype=torch.float64):
    """[2, 11]: -inf at padding, other floats elsewhere."""
    floats = torch.linspace(-3, 2, 22, dtype=torch.float64).view(2, 11).roll(3, 1).contiguous()
    return floats.masked_fill(padding(), -torch.inf).to(dtype)


def heads_of(module, x):
    """The values that each query head reads, [B, H, T, D]."""
    values = module.value_proj(x).unflatten(-1, (module.num_kv_heads, -1)).transpose(1, 2)
    return values.repeat_interleave(NUM_HEADS // module.num_kv_heads, 1)


@pytest.mark.parametrize("name, causal", [case for case in both_ways if "vapor" not in case[0]])
def test_a_float_mask_biases_every_key(name, causal):
    """Against plain arithmetic: p(s|t) ∝ p(s|t without it) exp(bias[s]) in each latent and in the window."""
    module, x, floats = make(name), tokens(), float_padding()
    out, weights = module(x, key_padding_mask=floats, is_causal=causal, need_weights=True, average_attn_weights=False)
    assert_close(module.out_proj((weights @ heads_of(module, x)).transpose(1, 2).flatten(-2)), out)
    assert (weights.transpose(-1, -2)[1, :, padding()[1]] == 0).all()
    # One part of the mixture at a time, the others' gates shut.
    if module.query_logits_proj.bias is None:
        return
    for part in range(module.query_logits_proj.out_features // NUM_HEADS):
        apart = copy.deepcopy(module)
        with torch.no_grad():
            apart.query_logits_proj.weight.zero_()
            apart.query_logits_proj.bias.view(NUM_HEADS, -1).fill_(-torch.inf)[:, part] = 0
        unbiased, biased = (
            apart(x, key_padding_mask=mask, is_causal=causal, need_weights=True, average_attn_weights=False)[1]
            for mask in (floats.isneginf(), floats)
        )
        expected = unbiased * floats.exp()[:, None, None, :]
        total = expected.sum(-1, keepdim=True)
        assert_close(biased, expected / total.masked_fill(total == 0, 1))
    assert_close(module(x[1], key_padding_mask=floats[1], is_causal=causal)[0], out[1])  # without a batch
    assert (module(x, key_padding_mask=floats.isneginf(), is_causal=causal)[0] - out)[~padding()].norm() > 1e-3


@every_variant_both_ways
def test_what_is_closed_gives_zero(name, causal):
    """Query logits of -inf: of the latents, of the window, of all; with gradients that are finite."""
    for parts in (slice(1, None), slice(0, 1), slice(None)):
        module = make(name)
        if module.query_logits_proj.bias is None or (parts != slice(None) and "macchiato" not in name):
            continue
        with torch.no_grad():
            module.query_logits_proj.bias.view(NUM_HEADS, -1)[:, parts] = -torch.inf
        out, weights = module(tokens(), is_causal=causal, need_weights=True)
        assert out.isfinite().all() and weights.isfinite().all()
        if parts == slice(None):
            assert (weights == 0).all()
            assert_close(out, module.out_proj(torch.zeros_like(out)))
        out.square().sum().backward()
        for key, parameter in module.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), (parts, key)


def test_another_dtype_or_window_is_an_error():
    module = LatteAttention(EMBED_DIM, NUM_HEADS, batch_first=True)
    with pytest.raises(TypeError, match="query has dtype torch.float64, expected the module's, torch.float32"):
        module(torch.randn(1, 4, EMBED_DIM, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(1, 4, EMBED_DIM, dtype=torch.bfloat16))[0].isfinite().all()
    with pytest.raises(ValueError, match="window must be in 1"):
        MacchiatoAttention(EMBED_DIM, NUM_HEADS, window=2**62)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [11, 4])
def test_a_float_mask_is_multihead_attentions(causal, window):
    """With the gate to the window wide open: torch's module itself, whose every token reads the window alone."""
    module = MacchiatoAttention(EMBED_DIM, NUM_HEADS, batch_first=True, dtype=torch.float64, window=window, rope=False)
    torch_module = torch.nn.MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        module.query_logits_proj.bias.view(NUM_HEADS, -1)[:, 0] = 1e4
        for part in ("query", "key", "value", "out"):
            torch.nn.init.normal_(module.get_submodule(f"{part}_proj").bias)
        torch_module.in_proj_weight.copy_(torch.cat([module.query_proj.weight, module.key_proj.weight, module.value_proj.weight]))
        torch_module.in_proj_bias.copy_(torch.cat([module.query_proj.bias, module.key_proj.bias, module.value_proj.bias]))
        torch_module.out_proj.load_state_dict(module.out_proj.state_dict())
    distance = torch.arange(11)[:, None] - torch.arange(11)
    outside = (distance.abs() >= window) | ((distance < 0) & causal)
    attn_mask = torch.zeros(11, 11, dtype=torch.float64).masked_fill(outside, -torch.inf)
    results = []
    for attend in (
        lambda x, floats: module(x, key_padding_mask=floats, is_causal=causal, need_weights=True),
        lambda x, floats: torch_module(x, x, x, key_padding_mask=floats, attn_mask=attn_mask, need_weights=True),
    ):
        x, floats = tokens().requires_grad_(), float_padding()
        floats[1] = floats[0].flip(0)  # torch gives NaN where a token may read nothing
        floats.requires_grad_()
        out, weights = attend(x, floats)
        results.append([out, weights, *torch.autograd.grad(out.square().sum(), (x, floats))])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, 1e-10)


@every_variant_both_ways
def test_a_float_mask_carries_gradients(name, causal):
    module, x, ignored = make(name), tokens(length=6), padding(length=6)

    def run(floats):
        return module(x, key_padding_mask=floats.masked_fill(ignored, -torch.inf), is_causal=causal)[0]

    floats = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)
    assert torch.autograd.gradcheck(run, floats.requires_grad_())
    # Where a bias could be left out, as all of it is 0, it has a gradient all the same.
    zeros = torch.zeros_like(floats, requires_grad=True)
    assert torch.autograd.grad(run(zeros).square().sum(), zeros)[0].norm() > 1e-3


@pytest.mark.parametrize("name", [name for name in VARIANTS if "macchiato" in name or name in ("latte", "latte-forget")])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("cuts", [(4, 7), (5, 1, 5)])
def test_whole_is_chunked_under_a_float_mask(name, dtype, tolerance, cuts):
    """Stretches with a float mask, with a bool mask and without one follow each other."""
    module, x, floats = make(name).to(dtype), tokens(dtype=dtype), float_padding(dtype)
    for first, later in (("float", "float"), ("float", "bool"), ("bool", "float"), ("none", "float"), ("float", "none")):
        masks = []
        for i, part in enumerate(floats.split(cuts, 1)):
            masks.append({"float": part, "bool": part.isneginf(), "none": None}[later if i else first])
        full = [torch.zeros_like(x[:, : part.shape[1], 0]) if mask is None else
                torch.zeros_like(part).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
                for mask, part in zip(masks, floats.split(cuts, 1), strict=True)]  # fmt: skip
        whole = module(x, key_padding_mask=torch.cat(full, 1), is_causal=True)[0]
        state, pieces = None, []
        for piece, mask in zip(x.split(cuts, 1), masks, strict=True):
            out, _, state = module(piece, key_padding_mask=mask, is_causal=True, state=state, output_state=True)
            pieces.append(out)
        assert_close(torch.cat(pieces, 1), whole, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("name", ["latte", "macchiato", "macchiato-sinks"])
def test_a_float_mask_in_other_dtypes(name, dtype, tolerance):
    """Also of float32 beside a narrower module, and with numbers that stand for -inf but are finite."""
    module, x = make(name).to(dtype), tokens(dtype=dtype)
    wide = copy.deepcopy(module).double()
    lowest = torch.finfo(torch.float32).min
    huge = float_padding(torch.float32)
    huge[0, :4] = lowest  # what these tokens read, differences in 1e30, is lost in rounding; later ones read none of them
    for floats, first in ((float_padding(dtype), 0), (float_padding(torch.float32), 0), (huge, 4)):
        out = module(x, key_padding_mask=floats, is_causal=True)[0]
        assert out.dtype == dtype
        assert_close(out[:, first:], wide(x.double(), key_padding_mask=floats.double(), is_causal=True)[0][:, first:], tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        out = make(name).float()(tokens(dtype=torch.float32), key_padding_mask=huge, is_causal=True)[0]
    assert_close(out[:, 4:], make(name)(tokens(), key_padding_mask=huge.double(), is_causal=True)[0][:, 4:], 5e-2)
    # A finite bias, however low, is no padding: where there is nothing else it is read.
    out, weights = module(x, key_padding_mask=torch.full((2, 11), lowest), is_causal=True, need_weights=True)
    assert_close(weights.double().sum(-1), torch.ones(2, 11), tolerance)
    assert out.isfinite().all() and (out - module.out_proj.bias).norm() > 1e-3


@every_variant
@pytest.mark.parametrize("cuts", [(1,) * 11, (4, 7), (5, 1, 5), (10, 1)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_whole_is_chunked_is_step_by_step(name, cuts, padded, dtype, tolerance):
    module, x = make(name).to(dtype), tokens(dtype=dtype)
    ignored = padding() if padded else torch.zeros(2, 11, dtype=torch.bool)
    whole, weights, final = module(x, key_padding_mask=ignored, is_causal=True, output_state=True)
    assert weights is None and final.position == 11
    state, pieces = None, []
    for piece, mask in zip(x.split(cuts, 1), ignored.split(cuts, 1), strict=True):
        out, _, state = module(piece, key_padding_mask=mask, is_causal=True, state=state, output_state=True)
        pieces.append(out)
    assert_close(torch.cat(pieces, 1), whole, tolerance)
    assert state.position == 11
    # The next token reads the same from either state.
    next_token = tokens(length=1, dtype=dtype, seed=2)
    expected = module(next_token, is_causal=True, state=final)[0]
    assert_close(module(next_token, is_causal=True, state=state)[0], expected, tolerance)


@every_variant
def test_state_carries_gradients(name):
    module = make(name)
    x = tokens().requires_grad_()
    module(x, is_causal=True)[0].square().sum().backward()
    expected, x.grad = x.grad, None
    first, _, state = module(x[:, :5], is_causal=True, output_state=True)
    second, _, _ = module(x[:, 5:], is_causal=True, state=state)
    torch.cat([first, second], 1).square().sum().backward()
    assert_close(x.grad, expected, 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
@every_variant_both_ways
def test_outputs_and_gradients_in_other_dtypes(name, causal, dtype, tolerance):
    module = make(name).to(dtype)
    x = tokens(dtype=dtype).requires_grad_()
    out = module(x, key_padding_mask=padding(), is_causal=causal)[0]
    assert out.dtype == dtype
    wide, wide_x = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    expected = wide(wide_x, key_padding_mask=padding(), is_causal=causal)[0]
    assert_close(out, expected, tolerance)
    weight = tokens(dtype=dtype, seed=5)
    got = torch.autograd.grad(out, [x, *module.parameters()], weight)
    right = torch.autograd.grad(expected, [wide_x, *wide.parameters()], weight.double())
    assert_close(got[0], right[0], 2 * tolerance)
    # A projection's bias goes with its weight: that of the key logits has no gradient but rounding.
    owners = [parameter.rsplit(".", 1)[0] for parameter, _ in module.named_parameters()]
    for owner in set(owners):
        one, other = (
            torch.cat([g.flatten() for g, o in zip(grads[1:], owners, strict=True) if o == owner]) for grads in (got, right)
        )
        assert_close(one, other, 2 * tolerance)


def test_autocast():
    module, x = make("macchiato", dtype=torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, is_causal=True)[0]
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert_close(out, module(x, is_causal=True)[0], 4e-2)


@pytest.mark.parametrize("module_class, extra", [(LatteAttention, {}), (MacchiatoAttention, {"window": 3})])
def test_state_dict_is_the_contract(module_class, extra):
    build = dict(num_latents=5, num_kv_heads=2, **extra)
    module = module_class(16, 4, position="conv", forget=True, **build)
    expected = CONTRACT | {"conv.weight": (16, 4), "conv.bias": (16,), "decay_proj.weight": (10, 16), "decay_proj.bias": (10,)}
    if module_class is MacchiatoAttention:
        expected |= {"query_proj.weight": (16, 16), "query_proj.bias": (16,), "key_proj.weight": (8, 16), "key_proj.bias": (8,)}
        expected |= {"query_logits_proj.weight": (24, 16), "query_logits_proj.bias": (24,)}
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    factored = module_class(16, 4, forget=True, decay_rank=3, bias=False, **build).state_dict()
    decays = {key: tuple(value.shape) for key, value in factored.items() if key.startswith("decay")}
    assert decays == {"decay_down.weight": (3, 16), "decay_up.weight": (10, 3), "decay_up.bias": (10,)}
    gated = module_class(16, 4, position="rg_lru", bias=False, **build)
    assert {key for key in gated.state_dict() if key.startswith("rg_lru")} == {
        "rg_lru.recurrence_proj.weight",
        "rg_lru.input_proj.weight",
        "rg_lru.lambda",
    }
    assert not any(key.endswith("bias") for key in gated.state_dict())


@every_variant
def test_state_dict_deepcopy_and_pickle_round_trip(name):
    module, x = make(name), tokens()
    out = module(x, is_causal=True)[0]
    fresh = make(name)
    fresh.reset_parameters()
    assert (fresh(x, is_causal=True)[0] - out).norm() > 1e-3
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x, is_causal=True)[0], out)
    assert torch.equal(copy.deepcopy(module)(x, is_causal=True)[0], out)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, is_causal=True)[0], out)


def test_states_are_saved_by_their_public_name():
    state = latte.AttentionState(latents=torch.randn(1, 2, 3, 4), position=7)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.serialization.safe_globals([latte.AttentionState]):
        loaded = torch.load(file, weights_only=True)
    assert type(loaded) is latte.AttentionState and loaded.position == 7 and torch.equal(loaded.latents, state.latents)
    assert latte.AttentionState.__module__ == "latte.nn" and latte.nn.AttentionState is latte.AttentionState


def test_initial_parameters():
    torch.manual_seed(0)
    module = MacchiatoAttention(64, 4, position="rg_lru", forget=True)
    for name, parameter in module.named_parameters():
        if name.endswith(".weight"):
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif name.endswith(".bias"):
            assert (parameter == 0).all(), name
    squared = torch.sigmoid(-module.rg_lru.get_parameter("lambda").double()) ** 16
    assert 0.81 - 1e-5 <= squared.min() < 0.85 and 0.96 < squared.max() <= 0.998 + 1e-5


def test_dropout_acts_on_the_heads_output():
    module, x = make("latte", dropout=1.0), tokens()
    assert_close(module(x)[0], module.out_proj.bias.expand(2, 11, EMBED_DIM))
    module.eval()
    assert_close(module(x)[0], make("latte")(x)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_causal_attn_mask_is_recognised(dtype):
    module, x = make("macchiato"), tokens()
    causal = torch.ones(11, 11, dtype=torch.bool).triu(1)
    if dtype != torch.bool:
        causal = torch.nn.Transformer.generate_square_subsequent_mask(11, dtype=dtype)
    expected = module(x, is_causal=True)[0]
    assert torch.equal(module(x, x, x, attn_mask=causal)[0], expected)
    assert torch.equal(module(x, x, x, attn_mask=causal, is_causal=True)[0], expected)
    assert torch.equal(module(x, x, x, attn_mask=causal.expand(2 * NUM_HEADS, 11, 11))[0], expected)
    other = causal.clone()
    other[3, 2] = True if dtype == torch.bool else -torch.inf
    with pytest.raises(ValueError, match="not the causal mask"):
        module(x, x, x, attn_mask=other)
    nothing = torch.zeros_like(causal)
    assert torch.equal(module(x, x, x, attn_mask=nothing)[0], module(x)[0])
    assert torch.equal(module(x, x, x, attn_mask=nothing.expand(2 * NUM_HEADS, 11, 11))[0], module(x)[0])


@every_variant_both_ways
def test_compile_without_graph_breaks(name, causal):
    torch.compiler.reset()
    module, x = make(name), tokens().requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ignored in (padding(), float_padding()):
        out = compiled(x, key_padding_mask=ignored, is_causal=causal)[0]
        expected = module(x, key_padding_mask=ignored, is_causal=causal)[0]
        assert_close(out, expected)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        (grad_expected,) = torch.autograd.grad(expected.square().sum(), x)
        assert_close(grad, grad_expected, 1e-10)


@pytest.mark.parametrize("name", ["latte-conv", "latte-vapor", "macchiato-sinks"])
def test_compiled_decoding_does_not_recompile_for_each_token(name):
    torch.compiler.reset()
    module, x = make(name), tokens()
    expected = module(x, is_causal=True)[0]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda token, state: module(token, is_causal=True, state=state), fullgraph=True, backend=counter)
    with torch.no_grad():
        out, _, state = module(x[:, :1], is_causal=True, output_state=True)
        outs = [out]
        for token in x[:, 1:].split(1, 1):
            out, _, state = step(token, state)
            outs.append(out)
    assert_close(torch.cat(outs, 1), expected)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", ["latte-vapor", "macchiato-sinks"])
def test_gradients_against_finite_differences(name):
    module = make(name)
    x = tokens(batch=1, length=6).requires_grad_()
    parameters = dict(module.named_parameters())

    def run(x, *values):
        replaced = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(module, replaced, (x,), {"is_causal": True})[0]

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


def test_the_probabilities_have_finite_gradients():
    module = make("macchiato-sinks")
    x, ignored = tokens().requires_grad_(), padding()
    ignored[1, 0] = True
    module(x, key_padding_mask=ignored, is_causal=True, need_weights=True)[1].square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.norm() > 0


@pytest.mark.parametrize(
    "options, text",
    [
        ({"embed_dim": 15}, "multiple of num_heads"),
        ({"embed_dim": 0}, "positive"),
        ({"num_heads": 0}, "positive"),
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"kdim": 8}, "kdim is 8"),
        ({"vdim": 8}, "vdim is 8"),
        ({"dropout": 1.5}, "dropout"),
        ({"num_latents": 0}, "num_latents"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"position": "rotary"}, "none, vapor, conv, rg_lru"),
        ({"embed_dim": 12, "position": "vapor"}, "even"),
        ({"position": "conv", "conv_width": 0}, "conv_width"),
        ({"window": 0}, "window"),
        ({"sinks": -1}, "sinks"),
        ({"embed_dim": 12}, "even"),
        ({"rope_base": 0.0}, "rope_base"),
        ({"rope_base": float("nan")}, "rope_base"),
    ],
)
def test_constructor_errors(options, text):
    arguments = {"embed_dim": 16, "num_heads": 4} | options
    with pytest.raises(ValueError, match=text):
        MacchiatoAttention(**arguments)


@pytest.mark.parametrize("kind", [LatteAttention, MacchiatoAttention])
def test_shapes_on_the_meta_device(kind):
    module = kind(EMBED_DIM, NUM_HEADS, batch_first=True, device="meta")
    x = torch.empty(2, 11, EMBED_DIM, device="meta")
    for ignored in (torch.empty(2, 11, dtype=torch.bool, device="meta"), torch.empty(2, 11, device="meta")):
        assert module(x, key_padding_mask=ignored)[0].shape == x.shape
    with pytest.raises(ValueError, match="is_causal=True beside the causal mask"):
        module(x, attn_mask=torch.empty(11, 11, device="meta"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["latte", "macchiato"])
def test_forward_errors(name):
    module, x = make(name), tokens()
    with pytest.raises(ValueError, match="cross-attention"):
        module(x, x.clone(), x)
    with pytest.raises(ValueError, match="cross-attention"):
        module(x, x, x.clone())
    with pytest.raises(ValueError, match=r"expected \[B, T, 16\]"):
        module(x[..., :8])
    with pytest.raises(ValueError, match="expected"):
        module(x[0, 0])
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(2, 10\), expected \(2, 11\)"):
        module(x, key_padding_mask=padding()[:, :10])
    with pytest.raises(TypeError, match="torch.int64"):
        module(x, key_padding_mask=padding().long())
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="key_padding_mask has NaN or .inf"):
            module(x, key_padding_mask=torch.full((2, 11), value))
    causal = torch.ones(11, 11, dtype=torch.bool).triu(1)
    for mask in (causal[:10, :10], causal.expand(2, 11, 11), causal[:1]):
        with pytest.raises(ValueError, match=r"attn_mask has shape .*, expected \(11, 11\) or \(8, 11, 11\)"):
            module(x, attn_mask=mask, is_causal=True)
    with pytest.raises(TypeError, match="torch.int64"):
        module(x, attn_mask=torch.ones(11, 11, dtype=torch.int64).triu(1))
    with pytest.raises(ValueError, match="causal"):
        module(x, output_state=True)
    state = module(x, is_causal=True, output_state=True)[2]
    with pytest.raises(ValueError, match="causal"):
        module(x, state=state)
    for other in VARIANTS:
        after = make(other)(x, is_causal=True, output_state=True)[2]
        if other.split("-")[0] != name:
            with pytest.raises(ValueError, match="state comes from a module of another kind"):
                module(x, is_causal=True, state=after)
    for position in ("conv", "rg_lru"):
        with pytest.raises(ValueError, match=f"but {position} is read"):
            make(f"{name}-{position}")(x, is_causal=True, state=state)
    with pytest.raises(ValueError, match="whole sequence"):
        module(x, is_causal=True, state=state, need_weights=True)
    with pytest.raises(ValueError, match="causal"):
        make("latte-forget")(x)
    with pytest.raises(ValueError, match="sinks"):
        make("macchiato-sinks")(x)
    with pytest.raises(TypeError, match="nested"):
        module(torch.nested.nested_tensor([x[0], x[1, :5]]))
