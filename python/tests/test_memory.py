"""What training keeps between forward and backward, beside inputs and outputs: the figures of README's "Performance"."""

import latte
import pytest
import torch

TIME, HEADS, LATENTS, DIM, SEGMENT = 1024, 4, 16, 32, 256


def kept_bytes(function, inputs) -> int:
    """Of the storages that autograd saves, inputs and the output left out."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*inputs)
        out = out[0] if isinstance(out, tuple) else out
    for x in (*inputs, out):
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_little(dtype, kv_heads):
    def make(heads, size):
        return torch.randn(1, TIME, heads, size).to(dtype).requires_grad_()

    query, key, values = make(HEADS, DIM), make(kv_heads, DIM), make(kv_heads, DIM)
    query_logits, gated_logits, key_logits = make(HEADS, LATENTS), make(HEADS, LATENTS + 1), make(kv_heads, LATENTS)
    states = kv_heads * LATENTS * (DIM + 3) * 4 * TIME // SEGMENT
    window = HEADS * (DIM + 1) * 4 * TIME
    assert kept_bytes(latte.causal_attention, (query_logits, key_logits, values)) == states
    assert kept_bytes(latte.bidirectional_attention, (query_logits, key_logits, values)) == states * SEGMENT // TIME
    inputs = (query, key, values, gated_logits, key_logits)
    assert kept_bytes(lambda *x: latte.macchiato_attention(*x, window=8), inputs) == states + window
