#!/usr/bin/env python3
"""Writes tests/golden/modules.json: what LatteAttention and MacchiatoAttention compute from parameters that a formula gives.

python/tests/test_parity.py and src/nn/parity_test.cc build the same modules and compare names, shapes and outputs, so that
neither can drift from the other. The parameters, taken in the order of their names (by bytes) and row by row, are
0.4 sin(0.7 n + 0.1) for n = 0, 1, 2 …; the input [B, T, E] is sin(0.37 n) + 0.5 cos(1.3 n); in padded cases token t of row b is
padding where (3 b + t) mod 5 = 4; in biased ones key_padding_mask is of floats, which elsewhere are 2 sin(1.7 (3 b + t)). All is
float64.

    python/tests/make_modules_golden.py tests/golden/modules.json
"""

import json
import sys

import latte
import torch

VERSION = 2  # 2: biased cases
BATCH, TOKENS = 2, 7

# (name, module, options, causal, mask): options are the constructors' keyword arguments beyond batch_first, mask is one of "",
# "padded" and "biased".
CASES = [
    ("latte", "LatteAttention", {}, True, ""),
    ("latte_bidirectional", "LatteAttention", {"num_latents": 3}, False, "padded"),
    ("latte_grouped", "LatteAttention", {"num_kv_heads": 1, "num_latents": 5, "bias": False}, True, "padded"),
    ("latte_forget", "LatteAttention", {"forget": True}, True, "padded"),
    ("latte_vapor", "LatteAttention", {"position": "vapor"}, True, ""),
    ("latte_vapor_bidirectional", "LatteAttention", {"position": "vapor"}, False, "padded"),
    ("latte_conv", "LatteAttention", {"position": "conv", "conv_width": 3}, True, "padded"),
    ("latte_rg_lru", "LatteAttention", {"position": "rg_lru"}, True, "padded"),
    ("macchiato", "MacchiatoAttention", {"window": 3}, True, "padded"),
    ("macchiato_bidirectional", "MacchiatoAttention", {"window": 2, "rope_base": 100.0}, False, "padded"),
    ("macchiato_sinks", "MacchiatoAttention", {"window": 2, "sinks": 2, "num_kv_heads": 1, "num_latents": 3}, True, ""),
    ("macchiato_sinks_padded", "MacchiatoAttention", {"window": 2, "sinks": 2, "rope": False}, True, "padded"),
    ("macchiato_vapor", "MacchiatoAttention", {"window": 3, "position": "vapor", "forget": True, "decay_rank": 3}, True, ""),
    ("macchiato_rg_lru", "MacchiatoAttention", {"window": 3, "position": "rg_lru", "bias": False}, True, ""),
    ("latte_biased", "LatteAttention", {"num_latents": 3, "num_kv_heads": 1}, True, "biased"),
    ("latte_forget_biased", "LatteAttention", {"forget": True}, True, "biased"),
    ("latte_conv_bidirectional_biased", "LatteAttention", {"position": "conv"}, False, "biased"),
    ("macchiato_bidirectional_biased", "MacchiatoAttention", {"window": 2}, False, "biased"),
    ("macchiato_sinks_biased", "MacchiatoAttention", {"window": 2, "sinks": 2, "num_kv_heads": 1}, True, "biased"),
    ("macchiato_vapor_biased", "MacchiatoAttention", {"window": 3, "position": "vapor"}, True, "biased"),
]


def build(module: str, options: dict) -> torch.nn.Module:
    made = getattr(latte, module)(batch_first=True, dtype=torch.float64, **options)
    start = 0
    with torch.no_grad():
        for _, parameter in sorted(made.named_parameters()):
            n = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.4 * torch.sin(0.7 * n + 0.1)).view_as(parameter))
            start += parameter.numel()
    return made


def make_input(embed_dim: int) -> torch.Tensor:
    n = torch.arange(BATCH * TOKENS * embed_dim, dtype=torch.float64)
    return (torch.sin(0.37 * n) + 0.5 * torch.cos(1.3 * n)).view(BATCH, TOKENS, embed_dim)


def make_mask(kind: str) -> torch.Tensor | None:
    """key_padding_mask [B, T]."""
    n = 3 * torch.arange(BATCH)[:, None] + torch.arange(TOKENS)
    padding = n % 5 == 4
    biased = (2 * torch.sin(1.7 * n.double())).masked_fill(padding, -torch.inf)
    return {"": None, "padded": padding, "biased": biased}[kind]


def make_case(name: str, module: str, options: dict, causal: bool, mask: str) -> dict:
    options = {"embed_dim": 8, "num_heads": 2, **options}
    made = build(module, options)
    out, weights = made(
        make_input(options["embed_dim"]),
        key_padding_mask=make_mask(mask),
        is_causal=causal,
        need_weights=True,
        average_attn_weights=False,
    )
    return {
        "name": name,
        "module": module,
        "options": options,
        "causal": causal,
        "mask": mask,
        "parameters": {key: list(value.shape) for key, value in sorted(made.state_dict().items())},
        "out": out.flatten().tolist(),
        "weights": weights.flatten().tolist(),
    }


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    about = "Made by python/tests/make_modules_golden.py, which says what the inputs are"
    with torch.no_grad():
        cases = [json.dumps(make_case(*case)) for case in CASES]
    shape = f'"batch": {BATCH}, "tokens": {TOKENS}'
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(f'{{"version": {VERSION}, "about": {json.dumps(about)}, {shape}, "cases": [\n' + ",\n".join(cases) + "\n]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
