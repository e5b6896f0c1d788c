"""The probabilities p(s|t) behind an attention module's output as T × T matrices, for looking at: plain quadratic arithmetic in
float64, which shares nothing with the linear-time operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, Hkv, X] → float64 [B, H, T, X], each key-value head repeated for the query heads that read it."""
    return x.double().repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2)


def _distances(tokens: int, device: torch.device) -> Tensor:
    """t - s, int64 [T, T]."""
    steps = torch.arange(tokens, device=device)
    return steps[:, None] - steps[None, :]


def _softmax_over(scores: Tensor, readable: Tensor) -> Tensor:
    """Softmax over the last dimension within `readable`; a row with nothing readable is 0, and its gradient too."""
    scores = scores.masked_fill(~readable, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~readable, 0)


def latent_probabilities(
    shares: Tensor, key_logits: Tensor, *, causal: bool, key_mask: Tensor | None = None, log_decay: Tensor | None = None
) -> Tensor:
    """Σ_l p(l|t) p(s|l, t) (arXiv 2402.17512, equations 6 and 10).

    Args:
        shares: p(l|t), [B, T, H, L].
        key_logits: [B, T, Hkv, L].
        causal: s ≤ t alone.
        key_mask: bool [B, T], True = a real token.
        log_decay: [B, T, Hkv, L].

    Returns:
        float64 [B, H, T, T].
    """
    tokens, heads, latents = shares.shape[1:]
    keys = key_logits.double()
    readable = torch.ones(tokens, tokens, dtype=torch.bool, device=keys.device)
    if causal:
        readable = readable.tril()
    if key_mask is not None:
        readable = readable & key_mask[:, None, None, :]
    if log_decay is not None:
        decay = log_decay.double().clamp_min(-1e6)  # sums of -inf couldn't be subtracted
        if key_mask is not None:
            decay = decay.masked_fill(~key_mask[:, :, None, None], 0)
        keys = keys - decay.cumsum(1)  # forgetting is the paper's attention with these keys
    keys, shares = _per_query_head(keys, heads), _per_query_head(shares, heads)
    # One latent at a time: [B, H, T, T, L] at once would need L times the memory of the result.
    weights = keys.new_zeros(keys.shape[0], heads, tokens, tokens)
    for latent in range(latents):
        scores = keys[..., latent].unsqueeze(-2).expand_as(weights)
        weights = weights + shares[..., latent, None] * _softmax_over(scores, readable)
    return weights


def window_probabilities(
    query: Tensor,
    key: Tensor,
    *,
    window: int,
    causal: bool,
    sinks: int = 0,
    sink_query: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """p0(s|t), softmax attention over a window and sinks, scores scaled by 1/√Dk.

    Args:
        query: [B, T, H, Dk].
        key: [B, T, Hkv, Dk].
        window: W.
        causal: s ≤ t alone.
        sinks: S, causal only.
        sink_query: [B, T, H, Dk], scores the sinks that have left the window.
        key_mask: bool [B, T], True = a real token.
        key_bias: finite floats [B, T], added to the scores.

    Returns:
        float64 [B, H, T, T]; a row that may read nothing is 0.
    """
    tokens, heads, key_dim = query.shape[1:]
    keys = _per_query_head(key, heads).transpose(-2, -1)
    scores = _per_query_head(query, heads) @ keys
    distance = _distances(tokens, query.device)
    readable = distance.abs() < window
    if causal:
        past_sinks = (distance >= window) & (torch.arange(tokens, device=query.device) < sinks)
        if sink_query is not None:
            scores = torch.where(past_sinks, _per_query_head(sink_query, heads) @ keys, scores)
        readable = (readable & (distance >= 0)) | past_sinks
    if key_mask is not None:
        readable = readable & key_mask[:, None, None, :]
    scores = scores / math.sqrt(key_dim)
    if key_bias is not None:
        scores = scores + key_bias.double()[:, None, None, :]
    return _softmax_over(scores, readable)
