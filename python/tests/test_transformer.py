"""The modules inside torch.nn's Transformer layers, whose fast paths compute softmax attention from in_proj_weight."""

import copy
import warnings

import pytest
import torch
from helpers import EMBED_DIM, NUM_HEADS, VARIANTS, assert_close, is_causal_only, make, padding, tokens
from latte import LatteAttention, MacchiatoAttention

BIDIRECTIONAL = [name for name in VARIANTS if not is_causal_only(name)]


def make_layer(name: str, **options) -> torch.nn.TransformerEncoderLayer:
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}
    layer = torch.nn.TransformerEncoderLayer(EMBED_DIM, NUM_HEADS, 32, **options)
    layer.self_attn = make(name, batch_first=options["batch_first"])
    return layer


def make_encoder(name: str, **options) -> torch.nn.TransformerEncoder:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
        return torch.nn.TransformerEncoder(make_layer(name, **options), 2)


def by_parts(layers, x: torch.Tensor, ignored: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
    """The layers' arithmetic, attention called as a module."""
    for layer in layers:
        x = layer.norm1(x + layer.self_attn(x, key_padding_mask=ignored, is_causal=causal)[0])
        x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    return x


@pytest.mark.parametrize("name", BIDIRECTIONAL)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_encoder_computes_latent_attention(name, padded, training, gradients):
    encoder, x = make_encoder(name).train(training), tokens()
    ignored = padding() if padded else None
    with torch.set_grad_enabled(gradients):
        assert_close(encoder(x, src_key_padding_mask=ignored), by_parts(encoder.layers, x, ignored))
        assert_close(encoder.layers[0](x, src_key_padding_mask=ignored), by_parts(encoder.layers[:1], x, ignored))


@pytest.mark.parametrize("left_aligned", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("mask_check", [False, True])
def test_modules_put_into_a_finished_encoder_keep_its_fast_path_away(left_aligned, gradients, mask_check):
    layer = torch.nn.TransformerEncoderLayer(EMBED_DIM, NUM_HEADS, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    encoder = torch.nn.TransformerEncoder(layer, 2, mask_check=mask_check).eval()
    assert encoder.use_nested_tensor  # settled for MultiheadAttention
    for layer in encoder.layers:
        layer.self_attn = make("latte")
    x, ignored = tokens(), padding()
    if left_aligned:
        ignored[:, 2] = False
    with torch.set_grad_enabled(gradients):
        assert_close(encoder(x, src_key_padding_mask=ignored), by_parts(encoder.layers, x, ignored))


@pytest.mark.parametrize("name", ["latte", "macchiato"])
def test_padded_positions_change_nothing_else(name):
    encoder, x, ignored = make_encoder(name), tokens(), padding()
    out = {}
    for training in (True, False):
        encoder.train(training)
        out[training] = encoder(x, src_key_padding_mask=ignored)
        changed = torch.where(ignored[..., None], x - 5, x)
        assert_close(encoder(changed, src_key_padding_mask=ignored)[~ignored], out[training][~ignored])
    assert torch.equal(out[True], out[False])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("hint", [None, True])
def test_causal_encoder(name, hint):
    encoder, x = make_encoder(name), tokens()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(11, dtype=x.dtype)
    for training in (True, False):
        encoder.train(training)
        for ignored in (None, padding()):
            floats = None if ignored is None else torch.zeros(2, 11, dtype=x.dtype).masked_fill(ignored, -torch.inf)
            with torch.no_grad():
                out = encoder(x, mask=mask, is_causal=hint, src_key_padding_mask=floats)
            assert_close(out, by_parts(encoder.layers, x, ignored, causal=True))


def test_other_layouts_and_norm_first():
    x = tokens()
    encoder, time_first = make_encoder("macchiato"), make_encoder("macchiato", batch_first=False)
    time_first.load_state_dict(encoder.state_dict())
    assert_close(time_first(x.transpose(0, 1)).transpose(0, 1), encoder(x))
    assert_close(encoder.eval()(x[0]), encoder(x)[0])  # without a batch
    layer = make_layer("latte", norm_first=True).eval()
    y = x + layer.self_attn(layer.norm1(x))[0]
    assert_close(layer(x), y + layer.linear2(layer.linear1(layer.norm2(y)).relu()))


def test_decoder_layer_takes_it_as_self_attention():
    layer = torch.nn.TransformerDecoderLayer(EMBED_DIM, NUM_HEADS, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = make("macchiato")
    mask = torch.nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    x, memory = tokens(), tokens(length=5, seed=3)
    changed = x.clone()
    changed[:, 7:] += 1
    assert_close(layer(changed, memory, tgt_mask=mask)[:, :7], layer(x, memory, tgt_mask=mask)[:, :7])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_encoder(backend, request):
    if backend == "inductor":
        request.getfixturevalue("inductor")
    torch.compiler.reset()
    encoder, x = make_encoder("macchiato"), tokens().requires_grad_()
    floats = torch.zeros(2, 11, dtype=x.dtype).masked_fill(padding(), -torch.inf)
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    out, expected = (run(x, src_key_padding_mask=floats) for run in (compiled, encoder))
    assert_close(out, expected)
    grads = [torch.autograd.grad(y.square().sum(), [x, *encoder.parameters()]) for y in (out, expected)]
    for grad, grad_expected in zip(*grads, strict=True):
        assert_close(grad, grad_expected, 1e-10)
    encoder.eval()
    with torch.no_grad():
        assert_close(compiled(x, src_key_padding_mask=floats), encoder(x, src_key_padding_mask=floats))


@pytest.mark.parametrize("kind", [LatteAttention, MacchiatoAttention])
def test_training_learns_to_copy(kind):
    """The second half of a sequence repeats the first, so past the middle the next token stands five back."""
    torch.manual_seed(0)
    symbols, width, length = 6, 32, 5
    layer = torch.nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
    layer.self_attn = kind(width, 4, batch_first=True, position="conv", conv_width=6)
    embed, head = torch.nn.Embedding(symbols, width), torch.nn.Linear(width, symbols)
    model = torch.nn.ModuleList([embed, layer, head])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(2 * length - 1)
    losses = []
    for _ in range(150):
        half = torch.randint(symbols, (16, length))
        text = torch.cat([half, half], 1)
        logits = head(layer(embed(text[:, :-1]), src_mask=mask, is_causal=True))
        loss = torch.nn.functional.cross_entropy(logits[:, length:].flatten(0, 1), text[:, length + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert first > 1.6 and last < 0.7 * first, f"loss went from {first:.3f} to {last:.3f}"


@pytest.mark.parametrize("kind", [LatteAttention, MacchiatoAttention])
def test_training_with_padding_learns_to_count(kind):
    """Which of two symbols a sequence has more of, in rows padded to one length; eval mode agrees."""
    torch.manual_seed(0)
    width, length = 32, 12
    layer = torch.nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
    layer.self_attn = kind(width, 4, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    embed, head = torch.nn.Embedding(2, width), torch.nn.Linear(width, 2)
    model = torch.nn.ModuleList([embed, encoder, head])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def run():
        text, lengths = torch.randint(2, (32, length)), torch.randint(1, length + 1, (32, 1))
        ignored = torch.arange(length) >= lengths
        logits = head(encoder(embed(text), src_key_padding_mask=ignored)[:, 0])  # the first token has to look
        more = ((2 * text - 1).masked_fill(ignored, 0).sum(1) > 0).long()
        return torch.nn.functional.cross_entropy(logits, more), (logits.argmax(-1) == more).float().mean().item()

    for _ in range(200):
        loss, _ = run()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = sum(run()[1] for _ in range(10)) / 10
    assert accuracy > 0.75, f"{accuracy:.3f} of the answers are right; guessing gives half"


def test_copies_of_an_encoder_are_apart():
    encoder = make_encoder("latte")
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.layers[0].self_attn.value_proj.weight.add_(1)
    assert not torch.equal(other(tokens()), encoder(tokens()))
