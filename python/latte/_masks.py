"""torch.nn.MultiheadAttention's masks, translated: its key_padding_mask to the operators' key_mask, its attn_mask to "causal or
not".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def _has_values(mask: Tensor) -> bool:
    """Whether what the mask holds can be looked at now."""
    return not (torch.compiler.is_compiling() or mask.is_meta or isinstance(mask, FakeTensor))


def key_mask_from_padding(padding: Tensor | None, batch: int, tokens: int, batched: bool) -> Tensor | None:
    """The operators' mask (True = a real token) from a key_padding_mask (True = padding, or floats with -inf at padding).

    Args:
        padding: bool or floating [B, T]; [T] where the input has no batch.
        batch: B.
        tokens: T.
        batched: whether the input has a batch dimension.

    Returns:
        bool [B, T], or None for no mask.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or a float other than 0 and -inf (not looked at on the meta device or while torch.compile
            traces).
    """
    if padding is None:
        return None
    expected = (batch, tokens) if batched else (tokens,)
    if tuple(padding.shape) != expected:
        raise ValueError(f"key_padding_mask has shape {tuple(padding.shape)}, expected {expected}")
    if padding.dtype == torch.bool:
        real = padding.logical_not()
    elif padding.is_floating_point():
        real = padding != -torch.inf
        if _has_values(padding) and bool((padding.masked_fill(~real, 0) != 0).any()):
            raise ValueError(
                "key_padding_mask has floats other than 0 and -inf: a token is read or ignored, its logits take no additive mask"
            )
    else:
        raise TypeError(f"key_padding_mask has dtype {padding.dtype}, expected torch.bool or a floating dtype")
    return real if batched else real.unsqueeze(0)


def is_causal_request(attn_mask: Tensor | None, is_causal: bool, tokens: int, rows: int) -> bool:
    """Whether attention is to be causal.

    Args:
        attn_mask: None, or the causal mask: bool [T, T] with True above the diagonal, floats with -inf there and 0 elsewhere, or
            that for each batch row and head, [B · H, T, T].
        is_causal: trusted, as MultiheadAttention does: `attn_mask` is then taken to be the causal mask and its values aren't
            read.
        tokens: T.
        rows: B · H.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or a mask that is not the causal one.
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
    if not bool((attn_mask == future).all()):
        raise ValueError(
            "attn_mask is not the causal mask (True or -inf above the diagonal alone): latent attention is causal or "
            "bidirectional, other masks would need the T × T matrix that it never forms"
        )
    return True
