#!/usr/bin/env python3
"""Writes tests/golden/modules.json: what LatteAttention and MacchiatoAttention compute from parameters that a formula gives.

python/tests/test_parity.py and src/nn/parity_test.cc build the same modules and compare names, shapes and outputs, so that
neither can drift from the other. The parameters, taken in the order of their names (by bytes) and row by row, are
0.4 sin(0.7 n + 0.1) for n = 0, 1, 2 …; the input [B, T, E] is sin(0.37 n) + 0.5 cos(1.3 n); token t of row b is padding where
(3 b + t) mod 5 = 4. All is float64.

    python/tests/make_modules_golden.py tests/golden/modules.json
"""

import json
import sys

import latte
import torch

VERSION = 1
BATCH, TOKENS = 2, 7

# (name, module, options, causal, padded); options are the constructors' keyword arguments beyond batch_first.
CASES = [
    ("latte", "LatteAttention", {}, True, False),
    ("latte_bidirectional", "LatteAttention", {"num_latents": 3}, False, True),
    ("latte_grouped", "LatteAttention", {"num_kv_heads": 1, "num_latents": 5, "bias": False}, True, True),
    ("latte_forget", "LatteAttention", {"forget": True}, True, True),
    ("latte_vapor", "LatteAttention", {"position": "vapor"}, True, False),
    ("latte_vapor_bidirectional", "LatteAttention", {"position": "vapor"}, False, True),
    ("latte_conv", "LatteAttention", {"position": "conv", "conv_width": 3}, True, True),
    ("latte_rg_lru", "LatteAttention", {"position": "rg_lru"}, True, True),
    ("macchiato", "MacchiatoAttention", {"window": 3}, True, True),
    ("macchiato_bidirectional", "MacchiatoAttention", {"window": 2, "rope_base": 100.0}, False, True),
    ("macchiato_sinks", "MacchiatoAttention", {"window": 2, "sinks": 2, "num_kv_heads": 1, "num_latents": 3}, True, False),
    ("macchiato_sinks_padded", "MacchiatoAttention", {"window": 2, "sinks": 2, "rope": False}, True, True),
    ("macchiato_vapor", "MacchiatoAttention", {"window": 3, "position": "vapor", "forget": True}, True, False),
    ("macchiato_rg_lru", "MacchiatoAttention", {"window": 3, "position": "rg_lru", "bias": False}, True, False),
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


def make_padding() -> torch.Tensor:
    return (3 * torch.arange(BATCH)[:, None] + torch.arange(TOKENS)) % 5 == 4


def make_case(name: str, module: str, options: dict, causal: bool, padded: bool) -> dict:
    options = {"embed_dim": 8, "num_heads": 2, **options}
    made = build(module, options)
    out, weights = made(
        make_input(options["embed_dim"]),
        key_padding_mask=make_padding() if padded else None,
        is_causal=causal,
        need_weights=True,
        average_attn_weights=False,
    )
    return {
        "name": name,
        "module": module,
        "options": options,
        "causal": causal,
        "padded": padded,
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
