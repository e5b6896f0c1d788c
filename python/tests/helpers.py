"""What the tests share: module variants, and a comparison whose tolerance comes from norms."""

import math

import torch
from latte import LatteAttention, MacchiatoAttention

EMBED_DIM = 16
NUM_HEADS = 4

# Every way to place a token, both modules, grouped-query heads, forgetting. name: (class, options)
VARIANTS = {
    "latte": (LatteAttention, {}),
    "latte-vapor": (LatteAttention, {"position": "vapor"}),
    "latte-conv": (LatteAttention, {"position": "conv", "conv_width": 3}),
    "latte-rg_lru": (LatteAttention, {"position": "rg_lru"}),
    "latte-grouped": (LatteAttention, {"num_kv_heads": 2, "num_latents": 5}),
    "latte-forget": (LatteAttention, {"forget": True, "num_kv_heads": 1, "bias": False}),
    "macchiato": (MacchiatoAttention, {"window": 3}),
    "macchiato-sinks": (MacchiatoAttention, {"window": 3, "sinks": 2, "num_kv_heads": 2, "num_latents": 3}),
    "macchiato-unrotated": (MacchiatoAttention, {"window": 2, "sinks": 1, "rope": False}),
    "macchiato-vapor": (MacchiatoAttention, {"window": 3, "position": "vapor", "rope_base": 100.0}),
    "macchiato-conv": (MacchiatoAttention, {"window": 3, "position": "conv", "forget": True, "decay_rank": 3}),
    "macchiato-rg_lru": (MacchiatoAttention, {"window": 3, "position": "rg_lru"}),
}


def is_causal_only(name: str) -> bool:
    options = VARIANTS[name][1]
    return bool(options.get("forget") or options.get("sinks"))


def make(name: str, **changes) -> torch.nn.Module:
    """The variant, batch first and in float64 unless changed, with biases that aren't zero."""
    kind, options = VARIANTS[name]
    torch.manual_seed(len(name))
    module = kind(EMBED_DIM, NUM_HEADS, **{"batch_first": True, "dtype": torch.float64, **options, **changes})
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def tokens(batch: int = 2, length: int = 11, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, EMBED_DIM, generator=generator, dtype=torch.float64).to(dtype)


def padding(batch: int = 2, length: int = 11) -> torch.Tensor:
    """bool [B, T], True = padding: none in the first row, the last four tokens and the third of the others."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[1:, -4:] = True
    mask[1:, 2] = True
    return mask


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    """‖got - expected‖ ≤ tolerance · (‖expected‖ + 0.01 √n): relative, with a floor for what is truly zero."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach().double(), expected.detach().double()
    error = torch.linalg.vector_norm(got - expected).item()
    allowed = tolerance * (torch.linalg.vector_norm(expected).item() + 0.01 * math.sqrt(expected.numel()))
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"
