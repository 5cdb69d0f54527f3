"""4-bit weights: a small change of the weights may be rounded away, and with it the forgetting.

Weights of linear layers are rounded to 4-bit NormalFloat (NF4) values and multiplied in the model's own precision, as
bitsandbytes does when it runs a 4-bit model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from prefopt.unlearning.audit.attack import Values, ask
from prefopt.unlearning.data import Question

BLOCK = 64
"""Weights that share a scale."""

_WHAT = "with 4-bit weights"


@dataclass(frozen=True)
class Quantization:
    """Ask a model whose linear layers have NF4 weights; the output layer is left as it is.

    Attributes:
        asked: the forget set.
        bitsandbytes: whether bitsandbytes rounds the weights; else `rounded_to_nf4` simulates it.
        max_new_tokens: of the greedy answers.
        max_length: plain texts are cut into parts of this many tokens.

    Reference: Zhang et al. 2024, arXiv 2410.16454 (quantisation brings forgotten answers back).
    """

    name: ClassVar[str] = "quantization"
    cheap: ClassVar[bool] = True

    asked: tuple[Question, ...]
    bitsandbytes: bool
    max_new_tokens: int = 64
    max_length: int | None = None

    @property
    def title(self) -> str:
        return f"4-bit weights ({'bitsandbytes' if self.bitsandbytes else 'simulated'})"

    @property
    def headline(self) -> str:
        return _WHAT

    def shown(self, what: str, measure: str) -> bool:
        return True

    def __call__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Values:
        round_weights(model, _by_bitsandbytes if self.bitsandbytes else rounded_to_nf4)
        return {_WHAT: ask(model, tokenizer, self.asked, self.max_new_tokens, self.max_length)}


@torch.no_grad()
def round_weights(model: Any, rounded: Callable[[Tensor], Tensor]) -> None:
    """Replace the weights of all linear layers but the output layer, in place."""
    output = model.get_output_embeddings()
    for module in model.modules():
        if module is output:
            continue
        if isinstance(module, nn.Linear):
            module.weight.copy_(rounded(module.weight))
        elif isinstance(module, Conv1D):  # GPT-2's linear layers; blocks run along the inputs of an output
            module.weight.copy_(rounded(module.weight.T.contiguous()).T)


def rounded_to_nf4(weight: Tensor) -> Tensor:
    """The nearest NF4 values: each block of 64 weights is scaled by its largest absolute value.

    Args:
        weight: of any shape; blocks run over its flattened values, the last may be shorter.

    Reference: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 3.
    """
    flat = weight.detach().float().flatten()
    padded = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = padded.abs().amax(1, keepdim=True)
    code = nf4_values().to(flat.device)
    middles = (code[1:] + code[:-1]) / 2
    # A block of zeros has no scale.
    nearest = code[torch.bucketize(padded / scale.clamp(min=torch.finfo(torch.float32).tiny), middles)]
    return (nearest * scale).flatten()[: len(flat)].view_as(weight).to(weight.dtype)


def nf4_values() -> Tensor:
    """(16,) the values of NF4 in [-1, 1]: quantiles of a normal distribution, with an exact zero.

    8 are positive and 7 negative, at evenly spaced probabilities up to (1 - 1/32 + 1 - 1/30) / 2, scaled to 1.

    Reference: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, appendix E.
    """
    last = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (last - 0.5) * step / 8) for step in range(1, 9)]
    negative = [-quantile(0.5 + (last - 0.5) * step / 7) for step in range(7, 0, -1)]
    return torch.tensor([value / positive[-1] for value in (*negative, 0.0, *positive)])


def bitsandbytes_runs(device: torch.device) -> bool:
    """Whether bitsandbytes is installed and rounds to NF4 on the device."""
    try:
        _by_bitsandbytes(torch.ones(BLOCK, device=device))
    except Exception:  # not installed, an older release, or no kernel for the device
        return False
    return True


def _by_bitsandbytes(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # Flat: on the CPU, release 0.50.2 returns wrong values for rows of a length that is no multiple of a block's.
    packed, state = quantize_4bit(weight.detach().flatten(), blocksize=BLOCK, quant_type="nf4")
    rounded: Tensor = dequantize_4bit(packed, state)
    return rounded.view_as(weight).to(weight.dtype)
