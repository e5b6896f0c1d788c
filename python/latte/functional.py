"""The operators as functions. They call `torch.ops.latte.*`, which checks shapes, dtypes and devices and knows autograd,
autocast and torch.compile.

Shapes: B batch, T tokens, H query heads, Hkv key-value heads (H is a multiple; query head h reads key-value head h // (H //
Hkv)), L latents a head, D head size of the values, Dk of query and key. With `cu_seqlens` (int64 [N + 1], from 0 to T, rising) B
is 1 and N sequences lie end to end; states then have N rows, else N = B. Tensors may have any strides.

Dtypes: float32, bfloat16 or float16 (accumulated in float32, states float32), or float64 throughout. Masks are bool, True = a
real token; a masked token adds to nothing. Where a latent (or the window) has seen no token its conditional output is 0.

Errors, from every function here: ValueError for a wrong shape or value, TypeError for a wrong dtype or device, with what came
and what was expected.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ops = torch.ops.latte


class MacchiatoState(NamedTuple):
    """Decoding state of `macchiato_attention` and `window_attention`, N sequences. Opaque outside latte's own operators.

    Attributes:
        latents: [N, Hkv, L, D + 3], the latents' state; of `window_attention`: no element.
        keys: [N, W, Hkv, Dk], the last W tokens' keys, the newest last.
        values: [N, W, Hkv, D], their values.
        mask: bool [N, W], True = a real token.
        sink_keys: [N, S, Hkv, Dk], the keys of the sinks, tokens 0 … S - 1.
        sink_values: [N, S, Hkv, D], their values.
        sink_mask: bool [N, S].
        position: int64 [N], tokens seen.
    """

    latents: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor
    sink_keys: Tensor
    sink_values: Tensor
    sink_mask: Tensor
    position: Tensor


def causal_attention(
    query_logits: Tensor,
    key_logits: Tensor,
    values: Tensor,
    *,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal latent attention (arXiv 2402.17512, equation 10), linear in T.

    y[t] = Σ_l p(l|t) Σ_{s≤t} p(s|l,t) v[s] with p(l|t) = softmax over l of query_logits[t,l] and
    p(s|l,t) = exp key_logits[s,l] / Σ_{s'≤t} exp key_logits[s',l].

    Args:
        query_logits: [B, T, H, L]. -inf switches a latent off for that token.
        key_logits: [B, T, Hkv, L].
        values: [B, T, Hkv, D].
        log_decay: [B, T, Hkv, L] ≤ 0 (not checked), forgetting: a token's weight is exp(key_logits[s] + Σ_{s<r≤t}
            log_decay[r]). None: nothing
            is forgotten, as in the paper.
        key_mask: bool [B, T].
        initial_state: [N, Hkv, L, D + 3], the state that an earlier call returned for the tokens before these.
        output_final_state: return the state after the last token.
        cu_seqlens: int64 [N + 1].

    Returns:
        out [B, T, H, D] in the inputs' dtype, and the state [N, Hkv, L, D + 3] (float32; float64 for float64 inputs) or None.
        Both carry gradients.
    """
    out, state = _ops.causal_attention(
        query_logits,
        key_logits,
        values,
        log_decay=log_decay,
        key_mask=key_mask,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    return out, state if output_final_state else None


def bidirectional_attention(
    query_logits: Tensor,
    key_logits: Tensor,
    values: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Bidirectional latent attention (arXiv 2402.17512, equation 6), linear in T.

    y[t] = Σ_l p(l|t) Σ_s p(s|l) v[s] with p(l|t) = softmax over l of query_logits[t,l] and p(s|l) = softmax over s of
    key_logits[s,l].

    Args:
        query_logits: [B, T, H, L].
        key_logits: [B, T, Hkv, L].
        values: [B, T, Hkv, D].
        key_mask: bool [B, T].
        cu_seqlens: int64 [N + 1].

    Returns:
        out [B, T, H, D] in the inputs' dtype.
    """
    return _ops.bidirectional_attention(query_logits, key_logits, values, key_mask=key_mask, cu_seqlens=cu_seqlens)


def macchiato_attention(
    query: Tensor,
    key: Tensor,
    values: Tensor,
    query_logits: Tensor,
    key_logits: Tensor,
    *,
    window: int,
    sinks: int = 0,
    sink_query: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    initial_state: MacchiatoState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, MacchiatoState | None]:
    """Latte-Macchiato (arXiv 2402.17512, section 3.4): a mixture of L latents and a window of standard attention, linear in T.

    y[t] = p(0|t) Σ_s p0(s|t) v[s] + Σ_{l≥1} p(l|t) Σ_s p(s|l,t) v[s], one softmax over L + 1 query logits. p0 is the softmax of
    query·key·scale over {t - W + 1 … t} ∪ {0 … S - 1}, none twice (causal), or over {|t - s| < W}. W and S count positions,
    padding included.

    Args:
        query: [B, T, H, Dk], already rotated where rotary embeddings are used.
        key: [B, T, Hkv, Dk], likewise.
        values: [B, T, Hkv, D].
        query_logits: [B, T, H, L + 1], index 0 the window's.
        key_logits: [B, T, Hkv, L].
        window: W ≥ 1.
        sinks: S ≥ 0, causal only.
        sink_query: [B, T, H, Dk], the query that scores a sink that has left the window (s ≤ t - W): `query` rotated as if at
            position min(t, W + S - 1). None: `query`.
        causal: read tokens up to t alone.
        scale: of the window's scores; 1/√Dk unless given.
        log_decay: [B, T, Hkv, L] ≤ 0, causal only; see `causal_attention`.
        key_mask: bool [B, T].
        initial_state: from an earlier call with the same window and sinks, causal only.
        output_final_state: return the state after the last token, causal only.
        cu_seqlens: int64 [N + 1].

    Returns:
        out [B, T, H, D] in the inputs' dtype, and the state or None. Both carry gradients.
    """
    out, state = _ops.macchiato_attention(
        query,
        key,
        values,
        query_logits,
        key_logits,
        window=window,
        sinks=sinks,
        sink_query=sink_query,
        causal=causal,
        scale=scale,
        log_decay=log_decay,
        key_mask=key_mask,
        initial_state=None if initial_state is None else list(initial_state),
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    return out, MacchiatoState(*state) if output_final_state else None


def window_attention(
    query: Tensor,
    key: Tensor,
    values: Tensor,
    *,
    window: int,
    sinks: int = 0,
    sink_query: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    initial_state: MacchiatoState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, MacchiatoState | None]:
    """The window of `macchiato_attention` alone: softmax attention over the last W tokens and S sinks, linear in T.

    Args and returns: as `macchiato_attention`; the state's `latents` has no element.
    """
    out, state = _ops.window_attention(
        query,
        key,
        values,
        window=window,
        sinks=sinks,
        sink_query=sink_query,
        causal=causal,
        scale=scale,
        key_mask=key_mask,
        initial_state=None if initial_state is None else list(initial_state),
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    return out, MacchiatoState(*state) if output_final_state else None


def merge_states(left: Tensor, right: Tensor) -> Tensor:
    """Joins the latent states of two stretches of tokens, `left` followed by `right`.

    Associative: with it a sequence may be cut anywhere, the pieces read apart (each from an empty state) and their states
    joined, as for prompt caching or sequence parallelism. Of a `MacchiatoState` it joins `latents`; the window's keys and values
    are those of the later stretch, with the end of the earlier one where that is shorter than the window.

    Args:
        left: [N, Hkv, L, D + 3], from `causal_attention`.
        right: the same shape and dtype.

    Returns:
        [N, Hkv, L, D + 3].
    """
    return _ops.merge_states(left, right)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution over time: out[t,c] = bias[c] + Σ_j weight[c,j] x[t - K + 1 + j, c].

    Args:
        x: [B, T, C]. Masked tokens and tokens before the sequence enter as zero.
        weight: [C, K], K ≥ 1.
        bias: [C].
        key_mask: bool [B, T].
        initial_state: [N, K - 1, C], the last K - 1 inputs before these, the oldest first.
        output_final_state: return the last K - 1 inputs.
        cu_seqlens: int64 [N + 1].

    Returns:
        out [B, T, C] in x's dtype, and the state [N, K - 1, C] or None.
    """
    out, state = _ops.causal_conv1d(
        x,
        weight,
        bias=bias,
        key_mask=key_mask,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    return out, state if output_final_state else None


def rg_lru(
    x: Tensor,
    recurrence_logits: Tensor,
    input_logits: Tensor,
    lambda_: Tensor,
    *,
    key_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Griffin's real-gated linear recurrence (arXiv 2402.19427, equations 1 to 4).

    h[t] = a h[t - 1] + √(1 - a²) sigmoid(input_logits[t]) x[t] with log a = -8 softplus(lambda_) sigmoid(recurrence_logits[t]).

    Args:
        x: [B, T, C]. A masked token leaves h as it was and outputs h.
        recurrence_logits: [B, T, C].
        input_logits: [B, T, C].
        lambda_: [C].
        key_mask: bool [B, T].
        initial_state: [N, C], h before the first token (0 unless given).
        output_final_state: return the last h.
        cu_seqlens: int64 [N + 1].

    Returns:
        h [B, T, C] in x's dtype, and the state [N, C] or None.
    """
    out, state = _ops.rg_lru(
        x,
        recurrence_logits,
        input_logits,
        lambda_,
        key_mask=key_mask,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    return out, state if output_final_state else None


def vapor(x: Tensor, positions: Tensor | None = None, base: float = 10000.0, inverse: bool = False) -> Tensor:
    """Rotates each vector by its token's position, angles in float64 (VAPOR; on queries and keys the same rotation is rotary
    embedding).

    Pairs are (i, i + D/2), the "rotate half" layout; pair i turns by position · base^(-2i/D).

    Args:
        x: [B, T, H, D], D even.
        positions: int64 [B, T] or [T]; 0 … T - 1 unless given.
        base: > 0.
        inverse: rotate back.

    Returns:
        [B, T, H, D] in x's dtype.
    """
    return _ops.vapor(x, positions, base, inverse)
