"""latte.convert: what is replaced, what is kept, what is copied, what is left and said."""

import copy
import warnings

import latte
import pytest
import torch
from helpers import assert_close
from latte import ConversionWarning, LatteAttention, MacchiatoAttention
from torch import nn


def make_encoder(**options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, **{"dropout": 0.1, "batch_first": True, "dtype": torch.float64, **options})
    return nn.TransformerEncoder(layer, 2)


def convert_quietly(model, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        return latte.convert(model, *arguments, **options)


@pytest.mark.parametrize("attention, kind", [("latte", LatteAttention), ("macchiato", MacchiatoAttention)])
def test_every_layer_is_replaced_in_place(attention, kind):
    encoder = make_encoder().eval()
    old = copy.deepcopy(encoder)
    assert convert_quietly(encoder, attention, num_latents=3) is encoder
    for layer, before in zip(encoder.layers, old.layers, strict=True):
        new, module = layer.self_attn, before.self_attn
        assert type(new) is kind
        assert new.num_latents == 3 and new.num_heads == 4 and new.dropout == 0.1 and new.batch_first and not new.training
        assert all(p.dtype == torch.float64 for p in new.parameters())
        parts = dict(zip(("query_proj", "key_proj", "value_proj"), module.in_proj_weight.chunk(3), strict=True))
        for name, weight in parts.items():
            if name == "value_proj" or attention == "macchiato":
                assert torch.equal(new.get_submodule(name).weight, weight)
        assert torch.equal(new.out_proj.weight, module.out_proj.weight)
        assert torch.equal(new.out_proj.bias, module.out_proj.bias)
    # A finished encoder would hand nested tensors to its layers here.
    x, ignored = torch.randn(2, 7, 16, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.bool)
    ignored[1, 4:] = True
    with torch.no_grad():
        out = encoder(x, src_key_padding_mask=ignored)
    assert_close(encoder.layers[1](encoder.layers[0](x, src_key_padding_mask=ignored), src_key_padding_mask=ignored), out)
    assert (old(x, src_key_padding_mask=ignored)[0] - out[0]).norm() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_macchiato_with_its_gate_open_is_the_attention_it_replaced(causal):
    torch.manual_seed(0)
    old = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    nn.init.normal_(old.in_proj_bias)
    nn.init.normal_(old.out_proj.bias)
    new = convert_quietly(copy.deepcopy(old), "macchiato", window=9)
    assert type(new) is MacchiatoAttention and not new.rope
    with torch.no_grad():
        new.query_logits_proj.bias.view(4, -1)[:, 0] += 1e4
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    ignored = torch.zeros(2, 9, dtype=torch.bool)
    ignored[1, 6:] = True
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1) if causal else None
    options = {"key_padding_mask": ignored, "attn_mask": mask, "is_causal": causal, "need_weights": True}
    (expected, expected_weights), (out, weights) = old(x, x, x, **options), new(x, x, x, **options)
    assert_close(out, expected)
    assert_close(weights, expected_weights)


def test_settings_are_kept():
    old = nn.MultiheadAttention(16, 4, dropout=0.25, bias=False, dtype=torch.bfloat16).requires_grad_(False).eval()
    new = convert_quietly(old)
    assert not new.batch_first and new.dropout == 0.25 and new.value_proj.bias is None and not new.training
    assert new.value_proj.weight.dtype == torch.bfloat16
    assert not new.value_proj.weight.requires_grad and not new.out_proj.weight.requires_grad
    assert new.query_logits_proj.weight.requires_grad  # starts afresh, so it has to learn
    assert convert_quietly(nn.MultiheadAttention(16, 4, device="meta")).out_proj.weight.is_meta


def test_grouped_heads_are_averaged():
    old = nn.MultiheadAttention(16, 4, dtype=torch.float64)
    nn.init.normal_(old.in_proj_bias)
    new = convert_quietly(copy.deepcopy(old), "macchiato", num_kv_heads=2)
    _, key, value = old.in_proj_weight.chunk(3)
    for projection, weight in ((new.key_proj, key), (new.value_proj, value)):
        assert_close(projection.weight[:4], (weight[:4] + weight[4:8]) / 2)
        assert_close(projection.weight[4:], (weight[8:12] + weight[12:]) / 2)
    assert_close(new.value_proj.bias[:4], (old.in_proj_bias[32:36] + old.in_proj_bias[36:40]) / 2)


def test_a_shared_module_stays_shared():
    attention = nn.MultiheadAttention(16, 4)
    model = nn.ModuleDict({"a": attention, "b": nn.ModuleList([attention])})
    convert_quietly(model)
    assert type(model["a"]) is LatteAttention and model["a"] is model["b"][0]


def test_cross_attention_is_left_and_named():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 1)
    with pytest.warns(ConversionWarning, match=r"layers\.0\.multihead_attn was left: it does cross-attention"):
        latte.convert(decoder)
    assert type(decoder.layers[0].self_attn) is LatteAttention
    assert type(decoder.layers[0].multihead_attn) is nn.MultiheadAttention
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    assert decoder(torch.randn(2, 5, 16), torch.randn(2, 3, 16), tgt_mask=mask).shape == (2, 5, 16)


class Subclass(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    "module, text",
    [
        (nn.MultiheadAttention(16, 4, kdim=8), "kdim=8"),
        (nn.MultiheadAttention(16, 4, vdim=8), "vdim=8"),
        (nn.MultiheadAttention(16, 4, add_bias_kv=True), "add_bias_kv"),
        (nn.MultiheadAttention(16, 4, add_zero_attn=True), "add_zero_attn"),
        (Subclass(16, 4), "Subclass"),
        (nn.Linear(2, 2), "no torch.nn.MultiheadAttention"),
    ],
)
def test_what_cannot_be_converted_is_left_and_named(module, text):
    model = nn.ModuleDict({"attention": module})
    with pytest.warns(ConversionWarning, match=text):
        latte.convert(model)
    assert model["attention"] is module


def test_modules_with_hooks_are_left_and_named():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 4), "b": nn.MultiheadAttention(16, 4)})
    model["a"].register_forward_hook(lambda *arguments: None)
    with pytest.warns(ConversionWarning, match="^latte.convert: a was left: it has hooks"):
        latte.convert(model)
    assert type(model["a"]) is nn.MultiheadAttention and type(model["b"]) is LatteAttention


def test_exclude():
    encoder = make_encoder()
    convert_quietly(encoder, exclude=["layers.0.self_attn"])
    assert type(encoder.layers[0].self_attn) is nn.MultiheadAttention and type(encoder.layers[1].self_attn) is LatteAttention
    x, ignored = torch.randn(2, 7, 16, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.bool)
    ignored[1, 4:] = True
    with torch.no_grad():  # the first layer alone would have the encoder hand nested tensors to the second
        encoder.eval()(x, src_key_padding_mask=ignored)


@pytest.mark.parametrize(
    "error, arguments, options",
    [
        (ValueError, ("softmax",), {}),
        (ValueError, (), {"exclude": ["layers.7.self_attn"]}),
        (ValueError, (), {"num_kv_heads": 3}),
        (ValueError, ("macchiato",), {"window": 0}),
        (TypeError, (), {"window": 3}),
        (TypeError, (), {"bias": False}),
    ],
)
def test_errors_leave_the_model_whole(error, arguments, options):
    encoder = make_encoder()
    modules = list(encoder.modules())
    with pytest.raises(error):
        latte.convert(encoder, *arguments, **options)
    assert list(encoder.modules()) == modules and encoder.use_nested_tensor


def test_a_converted_model_trains():
    torch.manual_seed(0)
    encoder = convert_quietly(make_encoder(dtype=torch.float32), "macchiato", window=2)
    x = torch.randn(4, 7, 16)
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (encoder(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in encoder.parameters())
