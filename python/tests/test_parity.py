"""Python's modules against tests/golden/modules.json, which the C++ modules are held against too (src/nn/parity_test.cc)."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from make_modules_golden import BATCH, CASES, TOKENS, VERSION, build, make_input, make_mask

GOLDEN = json.loads((Path(__file__).resolve().parents[2] / "tests" / "golden" / "modules.json").read_text())


def test_the_file_holds_every_case():
    assert (GOLDEN["version"], GOLDEN["batch"], GOLDEN["tokens"]) == (VERSION, BATCH, TOKENS)
    assert [case["name"] for case in GOLDEN["cases"]] == [case[0] for case in CASES]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_names_shapes_and_outputs(case, dtype, tolerance):
    module = build(case["module"], case["options"])
    assert {name: list(value.shape) for name, value in module.state_dict().items()} == case["parameters"]
    x = make_input(case["options"]["embed_dim"])
    out, weights = module.to(dtype)(
        x.to(dtype),
        key_padding_mask=make_mask(case["mask"]),
        is_causal=case["causal"],
        need_weights=True,
        average_attn_weights=False,
    )
    heads = case["options"]["num_heads"]
    assert math.prod(out.shape) == len(case["out"])
    assert_close(out, torch.tensor(case["out"], dtype=torch.float64).view_as(x), tolerance)
    assert_close(weights, torch.tensor(case["weights"], dtype=torch.float64).view(BATCH, heads, TOKENS, TOKENS), tolerance)
