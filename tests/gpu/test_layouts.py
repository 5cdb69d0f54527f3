"""Trees against padded rows on the device: log-probabilities and gradients of a step, in float32 and bfloat16."""

from __future__ import annotations

import functools
import importlib.util

import pytest
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tests.gpu.steps import Step, relative, run

EXACT = 1e-4
"""Relative difference in float32, sums of some thousand terms."""
ROUNDED = 0.02
"""The same in bfloat16, whose rounding is 0.004."""


@pytest.fixture(scope="module")
def truth(tmp_path_factory, small_model, device) -> Step:
    """Padded rows in float32."""
    return run(tmp_path_factory.mktemp("truth"), small_model, device, layout="padded")


def step(folder, model, device, attention: str, precision: str, layout: str) -> Step:
    return run(
        folder, model, device, layout=layout, bf16=precision == "bfloat16",
        model_init_kwargs={"attn_implementation": attention},
    )  # fmt: skip


def check(name: str, made: Step, truth: Step, precision: str, note, padded: Step | None = None) -> None:
    gaps = {"logps": relative(made.logps, truth.logps), "gradient": relative(made.gradient, truth.gradient)}
    note(name, gaps)
    if precision == "float32":
        assert max(gaps.values()) < EXACT
        return
    assert gaps["logps"] < ROUNDED
    # The gradient of a whole model in bfloat16 is off by what the model makes of its rounding, in any layout.
    own = 0.0 if padded is None else relative(padded.gradient, truth.gradient)
    assert gaps["gradient"] < max(2 * own, 0.1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trees_and_padded_rows_give_the_same_numbers(tmp_path, small_model, device, truth, note, attention, precision):
    make = functools.partial(step, model=small_model, device=device, attention=attention, precision=precision)
    padded = make(tmp_path / "padded", layout="padded")
    tree = make(tmp_path / "tree", layout="tree")
    check("padded", padded, truth, precision, note)
    check("tree", tree, truth, precision, note, padded)


def test_an_attention_that_takes_no_masks_is_scored_padded(tmp_path, small_model, device, truth, note, caplog):
    """What FlashAttention is to the layout, whether or not it is installed."""
    AttentionInterface.register("no_masks", sdpa_attention_forward)
    AttentionMaskInterface.register("no_masks", sdpa_mask)
    with caplog.at_level("WARNING"):
        made = step(tmp_path, small_model, device, "no_masks", "bfloat16", "auto")
    assert "padded layout" in caplog.text
    assert "'no_masks' does not take a mask of any shape" in caplog.text
    check("padded", made, truth, "bfloat16", note)


def test_flash_attention_is_scored_padded(tmp_path, small_model, device, truth, note, caplog):
    if device == "cpu" or importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    with caplog.at_level("WARNING"):
        made = step(tmp_path, small_model, device, "flash_attention_2", "bfloat16", "auto")
    assert "padded layout" in caplog.text
    check("padded", made, truth, "bfloat16", note)
