"""Linear-time latent attention for PyTorch.

`latte.causal_attention` and its siblings are the operators, `latte.LatteAttention` and `latte.MacchiatoAttention` the modules
that take torch.nn.MultiheadAttention's place in self-attention, `latte.convert` puts them into an existing model. The method is
that of "Latte: Latent Attention for Linear Time Transformers" (arXiv 2402.17512).
"""

from latte._library import load_library

load_library()

from latte.convert import ConversionWarning, convert  # noqa: E402
from latte.functional import (  # noqa: E402
    MacchiatoState,
    bidirectional_attention,
    causal_attention,
    causal_conv1d,
    macchiato_attention,
    merge_states,
    rg_lru,
    vapor,
    window_attention,
)
from latte.nn import AttentionState, LatteAttention, MacchiatoAttention  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AttentionState",
    "ConversionWarning",
    "LatteAttention",
    "MacchiatoAttention",
    "MacchiatoState",
    "bidirectional_attention",
    "causal_attention",
    "causal_conv1d",
    "convert",
    "macchiato_attention",
    "merge_states",
    "rg_lru",
    "vapor",
    "window_attention",
]
