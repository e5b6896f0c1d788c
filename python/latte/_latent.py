"""What the modules of latte.nn have in common: latents, positions, state, and torch.nn.MultiheadAttention's manners.

Shapes: B batch, T tokens, E embed_dim, H query heads, Hkv key-value heads (query head h reads key-value head h // (H // Hkv)), D
= E / H, L latents a head. latte's C++ modules of the same names have the same parameters and meanings.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latte._linear import Linear
from latte._masks import bias_key_logits, is_causal_request, split_padding
from latte._recurrent import CausalConv1d, RgLru
from latte.functional import MacchiatoState, bidirectional_attention, causal_attention, vapor

POSITIONS = ("none", "vapor", "conv", "rg_lru")
DECAY_DIVISOR = 16.0  # log_decay = logsigmoid(decay_proj(x)) / 16: a fresh module forgets slowly, as gated linear attention does
LARGEST_SIZE = 2**24  # of a window, in the C++ modules as well


class AttentionState(NamedTuple):
    """What an attention module carries from one stretch of a sequence to the next. Its size doesn't depend on how many tokens
    were seen.

    Attributes:
        latents: of LatteAttention: [B, Hkv, L, D + 3].
        macchiato: of MacchiatoAttention. Its keys have D features; D + 1 from the first key_padding_mask of floats on.
        conv: with position="conv": the convolution's last inputs, [B, K - 1, E].
        rg_lru: with position="rg_lru": [B, E].
        position: tokens seen, padding included.
    """

    latents: Tensor | None = None
    macchiato: MacchiatoState | None = None
    conv: Tensor | None = None
    rg_lru: Tensor | None = None
    position: int = 0


AttentionState.__module__ = "latte.nn"  # its public name, by which saved ones are found


class NoInProjection:
    """Stands where MultiheadAttention has its in_proj_weight.

    torch.nn.TransformerEncoder hands that tensor to torch.overrides.has_torch_function before its fast path and turns away from
    the path when an argument overrides torch functions, which this does. None would do in a TransformerEncoder built around one
    of these modules, but not in one that was built before the module was put in.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> NoReturn:
        raise TypeError(
            "latte's attention modules have no in_proj_weight: MultiheadAttention's fast path does not compute latent attention"
        )


def all_closed(query_logits: Tensor) -> Tensor:
    """[..., 1]: where every logit is -inf, so that no part of the mixture is read."""
    return query_logits.isneginf().all(-1, keepdim=True)


def shares_of(query_logits: Tensor) -> Tensor:
    """p(l|t) in float64, [..., L]: the softmax of `query_logits`, and 0 where all of them are -inf."""
    closed = all_closed(query_logits)
    return query_logits.double().masked_fill(closed, 0.0).softmax(-1).masked_fill(closed, 0.0)


def window_and_latents_share(query_logits: Tensor) -> tuple[Tensor, Tensor]:
    """p(0|t) and its complement, [..., 1] each: 0 and 0 where all logits are -inf. Float32, or float64 of float64 logits.

    Exact at both ends, with gradients that are finite there.
    """
    wide = query_logits.double() if query_logits.dtype == torch.float64 else query_logits.float()
    window, latents = wide[..., :1], wide[..., 1:]
    no_window, no_latents = window.isneginf(), all_closed(latents)
    gate = window.masked_fill(no_window, 0.0) - latents.masked_fill(no_latents, 0.0).logsumexp(-1, keepdim=True)
    return (
        gate.sigmoid().masked_fill(no_latents, 1.0).masked_fill(no_window, 0.0),
        (-gate).sigmoid().masked_fill(no_window, 1.0).masked_fill(no_latents, 0.0),
    )


class LatentAttention(nn.Module):
    """What LatteAttention and MacchiatoAttention share: MultiheadAttention's habits, the latents' projections and positions."""

    # What torch's Transformer modules read of self_attn: these three keep their fast paths, which compute softmax attention,
    # from being taken.
    _qkv_same_embed_dim = False
    in_proj_weight = NoInProjection()
    in_proj_bias = None
    # And MultiheadAttention's attributes of what isn't covered here.
    bias_k = None
    bias_v = None
    add_zero_attn = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        bias: bool,
        add_bias_kv: bool,
        add_zero_attn: bool,
        kdim: int | None,
        vdim: int | None,
        batch_first: bool,
        device,
        dtype,
        *,
        num_latents: int | None,
        num_kv_heads: int | None,
        position: str,
        conv_width: int,
        forget: bool,
        decay_rank: int,
        gates: int,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads != 0:
            raise ValueError(f"{name}: embed_dim must be a positive multiple of num_heads, got {embed_dim} and {num_heads}")
        if add_bias_kv or add_zero_attn:
            raise ValueError(
                f"{name}: add_bias_kv and add_zero_attn append a token to the keys, which a latent's running sums don't cover"
            )
        for argument, value in (("kdim", kdim), ("vdim", vdim)):
            if value is not None and value != embed_dim:
                raise ValueError(
                    f"{name}: {argument} is {value}, but this is self-attention: keys and values have embed_dim = {embed_dim}"
                )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{name}: dropout must lie between 0 and 1, got {dropout}")
        head_dim = embed_dim // num_heads
        num_latents = head_dim if num_latents is None else num_latents
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_latents <= 0:
            raise ValueError(f"{name}: num_latents must be positive, got {num_latents}")
        if num_kv_heads <= 0 or num_heads % num_kv_heads != 0:
            raise ValueError(f"{name}: num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if position not in POSITIONS:
            raise ValueError(f"{name}: position must be one of {', '.join(POSITIONS)}, got {position!r}")
        if position == "vapor" and head_dim % 2 != 0:
            raise ValueError(f"{name}: position='vapor' rotates pairs, so embed_dim / num_heads must be even, got {head_dim}")
        if position == "conv" and conv_width <= 0:
            raise ValueError(f"{name}: conv_width must be positive, got {conv_width}")
        if decay_rank < 0:
            raise ValueError(f"{name}: decay_rank must not be negative, got {decay_rank}")
        self.embed_dim = self.kdim = self.vdim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_latents = num_latents
        self.num_kv_heads = num_kv_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.position = position
        self.forget = forget

        factory = {"device": device, "dtype": dtype}
        self.query_logits_proj = Linear(embed_dim, num_heads * (num_latents + gates), bias=bias, **factory)
        self.key_logits_proj = Linear(embed_dim, num_kv_heads * num_latents, bias=bias, **factory)
        self.value_proj = Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **factory)
        self.out_proj = Linear(num_heads * head_dim, embed_dim, bias=bias, **factory)
        if forget and decay_rank == 0:
            self.decay_proj = Linear(embed_dim, num_kv_heads * num_latents, bias=bias, **factory)
        if forget and decay_rank > 0:
            self.decay_down = Linear(embed_dim, decay_rank, bias=False, **factory)
            self.decay_up = Linear(decay_rank, num_kv_heads * num_latents, **factory)
        if position == "conv":
            self.conv = CausalConv1d(embed_dim, conv_width, **factory)
        if position == "rg_lru":
            self.rg_lru = RgLru(embed_dim, bias=bias, **factory)

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases; decay_up, the convolution and RG-LRU have their own rules."""
        for child in self.children():
            if isinstance(child, nn.Linear):
                nn.init.xavier_uniform_(child.weight)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
            else:
                child.reset_parameters()
        if hasattr(self, "decay_up"):
            # Logits as large as what decay_down gives, and a head's latents that remember from 5 tokens to 300.
            nn.init.normal_(self.decay_up.weight, std=self.decay_up.in_features**-0.5)
            slowest = 3.0 if self.num_latents > 1 else 0.0
            with torch.no_grad():
                self.decay_up.bias.view(-1, self.num_latents).copy_(torch.linspace(-slowest, slowest, self.num_latents))

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_latents={self.num_latents}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        text += f", dropout={self.dropout}, batch_first={self.batch_first}"
        if self.position != "none":
            text += f", position={self.position!r}"
        if hasattr(self, "decay_up"):
            text += f", decay_rank={self.decay_up.in_features}"
        return text + (", forget=True" if self.forget else "")

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        state: AttentionState | None = None,
        output_state: bool = False,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, AttentionState]:
        """Self-attention; arguments as of torch.nn.MultiheadAttention except where said.

        Args:
            query: [T, B, E], with batch_first [B, T, E], without a batch [T, E].
            key: the same tensor as `query`, or None.
            value: the same tensor as `query`, or None.
            key_padding_mask: [B, T] ([T] without a batch): bool, True = padding, or floats: -inf at padding, what is finite is
                added to the token's key logits for every latent and, in a window, to its scores. It carries gradients. In half
                precision it is rounded to the module's dtype.
            need_weights: return p(s|t) too, by quadratic arithmetic, for looking at. MultiheadAttention's default is True.
            attn_mask: None, a mask of nothing or the causal mask (bool or float, [T, T] or [B · H, T, T]), checked unless
                is_causal=True.
            average_attn_weights: average those over the heads.
            is_causal: causal attention, with or without `attn_mask`.
            state: what came before these tokens, from an earlier call (causal only). A state is then returned as well.
            output_state: return the state after the last token (causal only).

        Returns:
            (out, weights), or (out, weights, state) when `state` is given or `output_state` set. out has query's shape. weights
            is None, or p(s|t): [B, T, T], not averaged [B, H, T, T]; without a batch there is no B. Dropout doesn't show in
            weights, and with position="vapor" the values that they weigh are rotated by the distance t - s.

        Raises:
            ValueError: a wrong shape; cross-attention; an attn_mask that isn't the causal mask; NaN or +inf in key_padding_mask;
                a state, or forget=True, where attention is bidirectional; need_weights with a state, whose past tokens'
                probabilities aren't known.
            TypeError: a wrong dtype, a nested tensor.
        """
        name = type(self).__name__
        if (key is not None and key is not query) or (value is not None and value is not query):
            raise ValueError(f"{name} is self-attention: query, key and value must be one tensor; cross-attention is not covered")
        if query.is_nested:
            raise TypeError(f"{name} takes no nested tensor: pass a padded one with key_padding_mask")
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            expected = f"[{'B, T' if self.batch_first else 'T, B'}, {self.embed_dim}] or [T, {self.embed_dim}]"
            raise ValueError(f"{name}: query has shape {tuple(query.shape)}, expected {expected}")
        weight = self.value_proj.weight
        if isinstance(weight, Tensor) and query.dtype != weight.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"{name}: query has dtype {query.dtype}, expected the module's, {weight.dtype}, or autocast")
        batched = query.dim() == 3
        if not batched:
            x = query.unsqueeze(0)
        else:
            x = query if self.batch_first else query.transpose(0, 1)
        batch, tokens = x.shape[:2]
        key_mask, key_bias = split_padding(key_padding_mask, batch, tokens, batched)
        causal = is_causal_request(attn_mask, is_causal, tokens, batch * self.num_heads)
        output_state = output_state or state is not None
        if output_state and not causal:
            raise ValueError(f"{name}: a state belongs to causal attention: pass is_causal=True")
        if state is not None and need_weights:
            raise ValueError(f"{name}: need_weights needs the whole sequence, a state doesn't hold its past tokens")
        if self.forget and not causal:
            raise ValueError(f"{name}: forget=True belongs to causal attention: pass is_causal=True")

        heads, weights, next_state = self._attend(x, key_mask, key_bias, causal, need_weights, state, output_state)
        heads = F.dropout(heads.flatten(-2), self.dropout, self.training)
        out = self.out_proj(heads)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None:
            weights = (weights.mean(1) if average_attn_weights else weights).to(out.dtype)
            weights = weights if batched else weights.squeeze(0)
        return (out, weights, next_state) if output_state else (out, weights)

    def _attend(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        key_bias: Tensor | None,
        causal: bool,
        need_weights: bool,
        state: AttentionState | None,
        output_state: bool,
    ) -> tuple[Tensor, Tensor | None, AttentionState | None]:
        """x [B, T, E], key_mask bool [B, T], key_bias [B, T] → the heads' output [B, T, H, D], weights [B, H, T, T] or None, the
        next state or None.
        """
        raise NotImplementedError

    def _logits(
        self, x: Tensor, key_mask: Tensor | None, key_bias: Tensor | None, state: AttentionState | None, output_state: bool
    ) -> tuple[Tensor, Tensor, AttentionState]:
        """query_logits [B, T, H, L or L + 1], key_logits [B, T, Hkv, L], and the next state's position, conv and rg_lru."""
        after = AttentionState(position=(0 if state is None else state.position) + x.shape[1])
        if self.position == "conv":
            x, memory = self.conv(x, key_mask, self._part(state, "conv"), output_state)
            after = after._replace(conv=memory)
        elif self.position == "rg_lru":
            x, memory = self.rg_lru(x, key_mask, self._part(state, "rg_lru"), output_state)
            after = after._replace(rg_lru=memory)
        query_logits = self.query_logits_proj(x).unflatten(-1, (self.num_heads, -1))
        key_logits = self.key_logits_proj(x).unflatten(-1, (self.num_kv_heads, -1))
        return query_logits, bias_key_logits(key_logits, key_bias), after

    def _part(self, state: AttentionState | None, name: str) -> Tensor | MacchiatoState | None:
        """The state's field that this module reads; None without a state.

        Raises:
            ValueError: the state has no such field.
        """
        if state is None:
            return None
        part = getattr(state, name)
        if part is None:
            held = [field for field in ("latents", "macchiato", "conv", "rg_lru") if getattr(state, field) is not None]
            raise ValueError(
                f"{type(self).__name__}: the state comes from a module of another kind: it holds {', '.join(held) or 'nothing'}, "
                f"but {name} is read here"
            )
        return part

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """[B, T, Hkv, L], or None where nothing is forgotten."""
        if not self.forget:
            return None
        logits = self.decay_proj(x) if hasattr(self, "decay_proj") else self.decay_up(self.decay_down(x))
        return F.logsigmoid(logits).unflatten(-1, (self.num_kv_heads, -1)) / DECAY_DIVISOR

    def _positions(self, x: Tensor, state: AttentionState | None) -> Tensor:
        """int64 [T]."""
        first = 0 if state is None else state.position
        return torch.arange(first, first + x.shape[1], device=x.device)

    def _read_latents(
        self,
        query_logits: Tensor,
        key_logits: Tensor,
        values: Tensor,
        *,
        positions: Tensor,
        causal: bool,
        key_mask: Tensor | None,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        output_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The latents' output [B, T, H, D], with VAPOR's rotations where chosen, and the latents' state or None."""
        rotate = self.position == "vapor"
        if rotate:
            values = vapor(values, positions)
        final_state = None
        if causal:
            out, final_state = causal_attention(
                query_logits,
                key_logits,
                values,
                log_decay=log_decay,
                key_mask=key_mask,
                initial_state=initial_state,
                output_final_state=output_state,
            )
        else:
            out = bidirectional_attention(query_logits, key_logits, values, key_mask=key_mask)
        return vapor(out, positions, inverse=True) if rotate else out, final_state
