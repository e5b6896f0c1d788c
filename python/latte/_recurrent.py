"""Modules over the two short-memory operators, which give latents a sense of position. Both look back only, in bidirectional
attention too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from latte._linear import Linear
from latte.functional import causal_conv1d, rg_lru


class CausalConv1d(nn.Module):
    """y[t,c] = bias[c] + Σ_j weight[c,j] x[t - K + 1 + j, c] with parameters `weight` [C, K] and `bias` [C], initialised as
    torch.nn.Conv1d's.

    Args:
        channels: C.
        width: K ≥ 1.

    Raises:
        ValueError: channels or width is not positive.
    """

    def __init__(self, channels: int, width: int, device=None, dtype=None) -> None:
        super().__init__()
        if channels <= 0 or width <= 0:
            raise ValueError(f"CausalConv1d: channels and width must be positive, got {channels} and {width}")
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, state: Tensor | None = None, output_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, C], key_mask bool [B, T] (True = real), state [B, K - 1, C] or None → out [B, T, C] and, if asked for, the
        new state.
        """
        return causal_conv1d(
            x, self.weight, bias=self.bias, key_mask=key_mask, initial_state=state, output_final_state=output_state
        )


class RgLru(nn.Module):
    """RG-LRU (arXiv 2402.19427, equations 1 to 4) whose gates read x.

    Parameters: Linear(C, C) `recurrence_proj` and `input_proj`, and `lambda` [C], drawn so that the slowest decay of a channel,
    a = sigmoid(-lambda)^8, has a² uniform in [0.81, 0.998], as Griffin's.

    Args:
        channels: C.
        bias: whether the gates' projections have one.

    Raises:
        ValueError: channels is not positive.
    """

    def __init__(self, channels: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        if channels <= 0:
            raise ValueError(f"RgLru: channels must be positive, got {channels}")
        self.recurrence_proj = Linear(channels, channels, bias=bias, device=device, dtype=dtype)
        self.input_proj = Linear(channels, channels, bias=bias, device=device, dtype=dtype)
        self.register_parameter("lambda", nn.Parameter(torch.empty(channels, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.recurrence_proj, self.input_proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        parameter = self.get_parameter("lambda")
        with torch.no_grad():
            # log a = -8 softplus(lambda), so lambda is softplus's inverse at -log(a²) / 16.
            squared = torch.empty_like(parameter, dtype=torch.float64).uniform_(0.81, 0.998)
            parameter.copy_(torch.log(torch.expm1(-torch.log(squared) / 16)))

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, state: Tensor | None = None, output_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, C], key_mask bool [B, T] (True = real), state [B, C] or None → out [B, T, C] and, if asked for, the new
        state.
        """
        return rg_lru(
            x,
            self.recurrence_proj(x),
            self.input_proj(x),
            getattr(self, "lambda"),
            key_mask=key_mask,
            initial_state=state,
            output_final_state=output_state,
        )
