"""torch.nn.MultiheadAttention's masks, translated: its key_padding_mask to the operators' key_mask and a bias on what they score
keys by, its attn_mask to "causal or not".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from latte.functional import MacchiatoState

LARGEST_BIAS = 1e30  # times 1/scale it is still far from float32's infinity


def _has_values(mask: Tensor) -> bool:
    """Whether what the mask holds can be looked at now."""
    return not (torch.compiler.is_compiling() or mask.is_meta or isinstance(mask, FakeTensor))


def split_padding(padding: Tensor | None, batch: int, tokens: int, batched: bool) -> tuple[Tensor | None, Tensor | None]:
    """A key_padding_mask (True = padding, or floats: -inf = padding, the others are added to what the token's keys score) as the
    operators' mask and that sum.

    Args:
        padding: bool or floating [B, T]; [T] where the input has no batch.
        batch: B.
        tokens: T.
        batched: whether the input has a batch dimension.

    Returns:
        key_mask, bool [B, T], True = a real token, or None for no mask; and key_bias, finite floats [B, T], 0 at padding, which
        carries gradients, or None where all are 0 (not looked at on the meta device or while torch.compile traces).

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or NaN or +inf (where they can be looked at).
    """
    if padding is None:
        return None, None
    expected = (batch, tokens) if batched else (tokens,)
    if tuple(padding.shape) != expected:
        raise ValueError(f"key_padding_mask has shape {tuple(padding.shape)}, expected {expected}")
    if padding.dtype != torch.bool and not padding.is_floating_point():
        raise TypeError(f"key_padding_mask has dtype {padding.dtype}, expected torch.bool or a floating dtype")
    padding = padding if batched else padding.unsqueeze(0)
    if padding.dtype == torch.bool:
        return padding.logical_not(), None
    real = padding != -torch.inf
    bias = padding.masked_fill(~real, 0)
    if _has_values(padding):
        if not bool(bias.isfinite().all()):
            raise ValueError("key_padding_mask has NaN or +inf, expected -inf (padding) or finite numbers")
        if not (bias.requires_grad or bool(bias.any())):
            return real, None
    return real, bias


def _finite_in(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias within what `dtype` holds, with room for a logit beside it: a huge one mustn't become -inf, which is padding."""
    limit = min(torch.finfo(dtype).max / 2, LARGEST_BIAS)
    return bias.clamp(-limit, limit)


def bias_key_logits(key_logits: Tensor, key_bias: Tensor | None) -> Tensor:
    """key_logits [B, T, Hkv, L] with key_bias [B, T] added for every latent, in key_logits' dtype."""
    if key_bias is None:
        return key_logits
    return (key_logits + _finite_in(key_bias, key_logits.dtype)[..., None, None]).to(key_logits.dtype)


def bias_window(
    query: Tensor, key: Tensor, sink_query: Tensor | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries [B, T, H, Dk] and keys [B, T, Hkv, Dk] with one feature more, through which query · key · scale has key_bias
    [B, T] (None: 0) added.

    The queries' feature is a power of 2, exact in every dtype, and the keys' no larger than the bias.
    """
    of_query = 2.0 ** math.ceil(-math.log2(scale))
    bias = key.new_zeros(key.shape[:2]) if key_bias is None else _finite_in(key_bias, key.dtype) / (scale * of_query)
    of_key = bias.to(key.dtype)[..., None, None].expand(*key.shape[:3], 1)

    def widened(x: Tensor) -> Tensor:
        return F.pad(x, (0, 1), value=of_query)

    return widened(query), torch.cat([key, of_key], -1), None if sink_query is None else widened(sink_query)


def is_causal_request(attn_mask: Tensor | None, is_causal: bool, tokens: int, rows: int) -> bool:
    """Whether attention is to be causal.

    Args:
        attn_mask: None, or the causal mask: bool [T, T] with True above the diagonal, floats with -inf there and 0 elsewhere, or
            that for each batch row and head, [B · H, T, T]; or one of these that masks nothing.
        is_causal: trusted, as MultiheadAttention does: `attn_mask` is then taken to be the causal mask and its values aren't
            read.
        tokens: T.
        rows: B · H.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or a mask that is neither the causal one nor empty.
    """
    if attn_mask is None:
        return is_causal
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask has dtype {attn_mask.dtype}, expected torch.bool or a floating dtype")
    shapes = (tokens, tokens), (rows, tokens, tokens)
    if tuple(attn_mask.shape) not in shapes:
        raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}, expected {shapes[0]} or {shapes[1]}")
    if is_causal:
        return True
    if not _has_values(attn_mask):
        raise ValueError(
            "attn_mask can't be looked into on the meta device or in a compiled model: pass is_causal=True beside the causal mask"
        )
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=attn_mask.device).triu(1)
    if attn_mask.dtype != torch.bool:
        future = torch.zeros(tokens, tokens, dtype=attn_mask.dtype, device=attn_mask.device).masked_fill(future, -torch.inf)
    if bool((attn_mask == future).all()):
        return True
    if bool((attn_mask == 0).all()):
        return False
    raise ValueError(
        "attn_mask is not the causal mask (True or -inf above the diagonal alone): latent attention is causal or "
        "bidirectional, other masks would need the T × T matrix that it never forms"
    )


def widen_keys(state: MacchiatoState | None, head_dim: int) -> MacchiatoState | None:
    """The state with keys of head_dim + 1 features, where it has head_dim: those of before came without a bias."""
    if state is None or state.keys.shape[-1] != head_dim:
        return state
    return state._replace(keys=F.pad(state.keys, (0, 1)), sink_keys=F.pad(state.sink_keys, (0, 1)))
