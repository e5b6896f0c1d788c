"""Latent attention as modules that take torch.nn.MultiheadAttention's place in self-attention (arXiv 2402.17512).

Shapes: B batch, T tokens, E embed_dim, H query heads, Hkv key-value heads (query head h reads key-value head h // (H // Hkv)), D
= E / H, L latents a head. latte's C++ modules of the same names have the same parameters and meanings.
"""

from __future__ import annotations

import math

from torch import Tensor

from latte._latent import LARGEST_SIZE, AttentionState, LatentAttention, shares_of, window_and_latents_share
from latte._linear import Linear
from latte._masks import bias_window, widen_keys
from latte._probabilities import latent_probabilities, window_probabilities
from latte.functional import macchiato_attention, vapor, window_attention

__all__ = ["AttentionState", "LatteAttention", "MacchiatoAttention"]


class LatteAttention(LatentAttention):
    """Latent attention in torch.nn.MultiheadAttention's place, linear in T: causal (arXiv 2402.17512, equation 10) or
    bidirectional (equation 6).

    Args:
        embed_dim: E.
        num_heads: H, which divides E.
        dropout: acts on the heads' output before out_proj. MultiheadAttention's acts on the probabilities p(s|t), which are
            never formed here.
        bias: whether the projections have one.
        add_bias_kv: False; for MultiheadAttention's signature.
        add_zero_attn: False; likewise.
        kdim: None or E; likewise.
        vdim: None or E; likewise.
        batch_first: [B, T, E] rather than [T, B, E].
        device: of the parameters.
        dtype: of the parameters.
        num_latents: L, of each head; D unless given.
        num_kv_heads: Hkv, which divides H; H unless given.
        position: how latents know where a token stands. "none"; "vapor": values are rotated by their position and what latents
            return is rotated back by the reader's, so D must be even; "conv": a causal convolution on the input of the query and
            key logits; "rg_lru": Griffin's real-gated linear recurrence there. The last two look back only, in bidirectional
            attention too.
        conv_width: K of position="conv".
        forget: latents forget: log_decay = logsigmoid(decay_proj(x)) / 16. Causal only.
        decay_rank: R > 0: decay_up(decay_down(x)) in decay_proj's place, as in gated linear attention (arXiv 2312.06635, section
            4.4). 0: a whole matrix.

    Parameters: `query_logits_proj` Linear(E, H · L), `key_logits_proj` Linear(E, Hkv · L), `value_proj` Linear(E, Hkv · D),
    `out_proj` Linear(H · D, E); with forget `decay_proj` Linear(E, Hkv · L), or with decay_rank R `decay_down` Linear(E, R)
    without a bias and `decay_up` Linear(R, Hkv · L) with one; `conv.weight` [E, K] and `conv.bias` [E], or
    `rg_lru.recurrence_proj`, `rg_lru.input_proj` Linear(E, E) and `rg_lru.lambda` [E], with that position. Logits carry no 1/√D
    scale.

    Raises:
        ValueError: an argument is out of range or not covered; the text says which and why.

    Example:
        >>> attention = LatteAttention(512, 8, batch_first=True)
        >>> out, _ = attention(x, is_causal=True)  # x: [B, T, 512]
        >>> prompt, _, state = attention(x[:, :100], is_causal=True, output_state=True)  # the same, a stretch at a time
        >>> token, _, state = attention(x[:, 100:101], is_causal=True, state=state)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        num_latents: int | None = None,
        num_kv_heads: int | None = None,
        position: str = "none",
        conv_width: int = 4,
        forget: bool = False,
        decay_rank: int = 0,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
            num_latents=num_latents,
            num_kv_heads=num_kv_heads,
            position=position,
            conv_width=conv_width,
            forget=forget,
            decay_rank=decay_rank,
            gates=0,
        )
        self.reset_parameters()

    def _attend(self, x, key_mask, key_bias, causal, need_weights, state, output_state):
        query_logits, key_logits, after = self._logits(x, key_mask, key_bias, state, output_state)
        log_decay = self._log_decay(x)
        out, latents = self._read_latents(
            query_logits,
            key_logits,
            self.value_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)),
            positions=self._positions(x, state),
            causal=causal,
            key_mask=key_mask,
            log_decay=log_decay,
            initial_state=self._part(state, "latents"),
            output_state=output_state,
        )
        weights = None
        if need_weights:
            shares = shares_of(query_logits)
            weights = latent_probabilities(shares, key_logits, causal=causal, key_mask=key_mask, log_decay=log_decay)
        return out, weights, after._replace(latents=latents) if output_state else None


class MacchiatoAttention(LatentAttention):
    """Latte-Macchiato (arXiv 2402.17512, section 3.4) in torch.nn.MultiheadAttention's place: latents and a window of standard
    attention.

    Args: those of LatteAttention, and
        window: W, how many tokens the window holds: the last W (causal), or those less than W away (bidirectional).
        sinks: S first tokens that every token reads as well, causal only: 0 in a module that is used bidirectionally.
        rope: rotate the window's queries and keys by their position (rotary embedding, rotate-half pairs); D must be even. A
            sink that has left the window is scored as if the reader stood at position min(t, W + S - 1), so distances stay in
            the trained range.
        rope_base: the base of those rotations.

    Parameters: those of LatteAttention; query_logits_proj is Linear(E, H · (L + 1)), laid out [H, L + 1] with the window's gate
    at index 0; and `query_proj` Linear(E, H · D), `key_proj` Linear(E, Hkv · D). With position="vapor" the latents' values alone
    are rotated, not the window's.

    Raises:
        ValueError: an argument is out of range or not covered; the text says which and why. forward: also sinks in bidirectional
            attention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        num_latents: int | None = None,
        num_kv_heads: int | None = None,
        position: str = "none",
        conv_width: int = 4,
        forget: bool = False,
        decay_rank: int = 0,
        window: int = 128,
        sinks: int = 0,
        rope: bool = True,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
            num_latents=num_latents,
            num_kv_heads=num_kv_heads,
            position=position,
            conv_width=conv_width,
            forget=forget,
            decay_rank=decay_rank,
            gates=1,
        )
        if not (1 <= window <= LARGEST_SIZE and 0 <= sinks <= LARGEST_SIZE):
            raise ValueError(
                f"MacchiatoAttention: window must be in 1 … {LARGEST_SIZE} and sinks at least 0 and at most that, "
                f"got {window} and {sinks}"
            )
        if rope and self.head_dim % 2 != 0:
            raise ValueError(
                f"MacchiatoAttention: rope=True rotates pairs, so embed_dim / num_heads must be even, got {self.head_dim}"
            )
        if not 0.0 < rope_base < float("inf"):
            raise ValueError(f"MacchiatoAttention: rope_base must be positive, got {rope_base}")
        self.window = window
        self.sinks = sinks
        self.rope = rope
        self.rope_base = rope_base
        self.query_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.key_proj = Linear(embed_dim, self.num_kv_heads * self.head_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, sinks={self.sinks}, rope={self.rope}"

    def _window_inputs(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """query [B, T, H, D], key [B, T, Hkv, D], sink_query [B, T, H, D] or None; rotated where rotary embedding is on."""
        query = self.query_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        key = self.key_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if not self.rope:
            return query, key, None
        sink_query = None
        if self.sinks > 0:
            sink_query = vapor(query, positions.clamp(max=self.window + self.sinks - 1), self.rope_base)
        return vapor(query, positions, self.rope_base), vapor(key, positions, self.rope_base), sink_query

    def _attend(self, x, key_mask, key_bias, causal, need_weights, state, output_state):
        if self.sinks > 0 and not causal:
            raise ValueError(
                "MacchiatoAttention: sinks belong to causal attention: pass is_causal=True, or sinks=0 to the constructor"
            )
        query_logits, key_logits, after = self._logits(x, key_mask, key_bias, state, output_state)
        values = self.value_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        positions = self._positions(x, state)
        query, key, sink_query = self._window_inputs(x, positions)
        log_decay = self._log_decay(x)
        before = self._part(state, "macchiato")
        reach = {"window": self.window, "sinks": self.sinks, "causal": causal, "key_mask": key_mask}
        local_weights = None
        if need_weights:
            local_weights = window_probabilities(query, key, sink_query=sink_query, key_bias=key_bias, **reach)
        scale = 1.0 / math.sqrt(self.head_dim)
        if key_bias is not None or (before is not None and before.keys.shape[-1] == self.head_dim + 1):
            query, key, sink_query = bias_window(query, key, sink_query, key_bias, scale)
            before = widen_keys(before, self.head_dim)
        window = reach | {"sink_query": sink_query, "scale": scale}
        if self.position == "vapor":
            # The window reads plain values and the latents rotated ones, so they are two calls, mixed here by the softmax over L
            # + 1 logits: p(0|t) = sigmoid(gate - logsumexp(the rest)).
            local, final_state = window_attention(
                query,
                key,
                values,
                initial_state=None if before is None else before._replace(latents=before.latents[:, :, :0]),
                output_final_state=output_state,
                **window,
            )
            distant, latents = self._read_latents(
                query_logits[..., 1:],
                key_logits,
                values,
                positions=positions,
                causal=causal,
                key_mask=key_mask,
                log_decay=log_decay,
                initial_state=None if before is None else before.latents,
                output_state=output_state,
            )
            window_share, latents_share = window_and_latents_share(query_logits)
            out = (window_share * local + latents_share * distant).to(local.dtype)
            if output_state:
                final_state = final_state._replace(latents=latents)
        else:
            out, final_state = macchiato_attention(
                query,
                key,
                values,
                query_logits,
                key_logits,
                log_decay=log_decay,
                initial_state=before,
                output_final_state=output_state,
                **window,
            )
        weights = None
        if need_weights:
            shares = shares_of(query_logits)
            far = latent_probabilities(shares[..., 1:], key_logits, causal=causal, key_mask=key_mask, log_decay=log_decay)
            weights = shares[..., 0].transpose(1, 2).unsqueeze(-1) * local_weights + far
        return out, weights, after._replace(macchiato=final_state) if output_state else None
