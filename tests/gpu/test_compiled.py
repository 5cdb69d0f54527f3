"""What torch compiles: FlexAttention over packed trees, and a whole model. Compiling takes most of the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import flex_attention

from tests.gpu.steps import relative, run


@pytest.fixture(autouse=True)
def _nothing_compiled():
    yield
    torch.compiler.reset()


def by_its_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_mask: Any, scale: float, enable_gqa: bool,
    **_: Any,
) -> torch.Tensor:  # fmt: skip
    """What FlexAttention computes, on a CPU, where it has no backward pass."""
    mask = create_mask(block_mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device=str(query.device))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_flex_attention_scores_trees(tmp_path, small_model, device, note, monkeypatch, precision):
    if device == "cpu":
        monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", by_its_mask)
    half = precision == "bfloat16"
    padded = run(tmp_path / "padded", small_model, device, layout="padded", bf16=half)
    tree = run(
        tmp_path / "tree", small_model, device, layout="tree", bf16=half,
        model_init_kwargs={"attn_implementation": "flex_attention"},
    )  # fmt: skip
    gaps = {"logps": relative(tree.logps, padded.logps), "gradient": relative(tree.gradient, padded.gradient)}
    note("gaps", gaps)
    assert gaps["logps"] < (0.02 if half else 1e-4)
    assert gaps["gradient"] < (0.1 if half else 1e-4)


def test_a_compiled_model_gives_the_same_step(tmp_path, small_model, device, note):
    plain = run(tmp_path / "plain", small_model, device)
    compiled = run(
        tmp_path / "compiled", small_model, device, torch_compile=True,
        torch_compile_backend="inductor" if device == "cuda" else "aot_eager",
    )  # fmt: skip
    gaps = {"logps": relative(compiled.logps, plain.logps), "gradient": relative(compiled.gradient, plain.gradient)}
    note("gaps", gaps)
    assert max(gaps.values()) < 1e-3
