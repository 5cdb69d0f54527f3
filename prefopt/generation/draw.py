"""How the next token of a row is drawn: from its logits, and from noise that depends on its seed and position alone.

So a sample does not change with the rows that happen to be computed with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prefopt.generation.samples import SamplingSettings

_FIRST_LOOK = 256
"""For top_p, this many likeliest tokens are sorted first; more only if they do not have enough probability."""
_BLOCK = 256
"""The cumulative distribution is searched in two steps: among blocks of this many tokens, then within one."""


def noise_of(seed: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Uniform numbers in [0, 1) for the positions of a row, the same on every machine (Philox, 53 bits)."""
    bits = np.random.Philox(key=seed).random_raw(length)
    return np.asarray(bits >> np.uint64(11), dtype=np.float64) * 2.0**-53


class TokenSampler:
    """Draws tokens by inverting each row's cumulative distribution at the row's own noise.

    Args:
        settings: temperature, top_p and top_k, applied in the order temperature, top_k, top_p.
        seeds: of each row.
        device: of the logits.
    """

    def __init__(self, settings: SamplingSettings, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self._settings = settings
        noise = np.stack([noise_of(seed, settings.max_new_tokens) for seed in seeds])
        self._noise = torch.from_numpy(noise).to(device, torch.float32 if _lacks_doubles(device) else torch.float64)

    def draw(self, logits: Tensor, rows: Tensor, positions: Tensor | int) -> Tensor:
        """The next token of each row, (N,).

        Args:
            logits: (N, V) of the last position.
            rows: (N,) which of the seeds each row has.
            positions: (N,) or one number: how many tokens each row has drawn before.
        """
        settings = self._settings
        if settings.temperature == 0:
            return logits.argmax(-1)
        noise = self._noise[rows, positions]
        logits = logits.float() / settings.temperature
        if settings.top_k == 0 and settings.top_p >= 1:
            return invert(logits.softmax(-1), noise)
        probabilities, tokens = likeliest(logits, settings.top_k, settings.top_p)
        return tokens.gather(1, invert(probabilities, noise)[:, None])[:, 0]


def likeliest(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities that do not sum to one, and tokens, likeliest first; what top_k and top_p cut off has zero.

    Args:
        logits: (N, V).
        top_k: this many likeliest tokens; 0 for all.
        top_p: of these, the fewest that have at least this much of their probability; at least one.
    """
    vocabulary = logits.shape[1]
    most = min(top_k or vocabulary, vocabulary)
    if top_p >= 1:
        values, tokens = logits.topk(most)
        return values.softmax(-1), tokens
    looked = min(most, _FIRST_LOOK)
    values, tokens = logits.topk(looked)
    if most == vocabulary:
        total = logits.logsumexp(-1, keepdim=True)
        probabilities = (values - total).exp()
        if looked < most and bool((probabilities.sum(-1) < top_p).any()):
            values, tokens = logits.sort(descending=True)
            probabilities = (values - total).exp()
    else:
        values, tokens = (values, tokens) if looked == most else logits.topk(most)
        probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return probabilities.masked_fill(before >= top_p, 0.0), tokens


def invert(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The item at which the cumulative sum of a row exceeds the row's share `noise` of the whole sum, (N,).

    Args:
        probabilities: (N, V), not negative; a row need not sum to one.
        noise: (N,) in [0, 1).
    """
    length = probabilities.shape[1]
    blocks = -(-length // _BLOCK)
    padded = torch.nn.functional.pad(probabilities, (0, blocks * _BLOCK - length)).view(-1, blocks, _BLOCK)
    ends = padded.sum(-1).to(noise.dtype).cumsum(-1)
    target = (noise * ends[:, -1])[:, None]
    block = _first_above(ends, target)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), torch.zeros_like(target))
    within = padded.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].to(noise.dtype)
    inside = _first_above(within.cumsum(-1), target - before)
    # Rounding may lead behind the last item with any probability in its block: back to that one.
    last = torch.where(within > 0, torch.arange(_BLOCK, device=within.device), 0).amax(-1, keepdim=True)
    return (block * _BLOCK + torch.minimum(inside, last))[:, 0]


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    return torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)


def _lacks_doubles(device: torch.device | str) -> bool:
    return torch.device(device).type == "mps"
