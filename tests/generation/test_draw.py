"""How a token is drawn: the exact distribution, and noise that depends on seed and position alone."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from prefopt.generation.draw import TokenSampler, invert, noise_of
from prefopt.generation.samples import SamplingSettings, sample_seed

DRAWS = 20_000
LIMIT = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5}
"""Chi-square at p = 0.001, by degrees of freedom."""


def warped(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """The distribution that transformers draws from with these settings."""
    if settings.temperature != 1:
        logits = TemperatureLogitsWarper(settings.temperature)(None, logits)
    if settings.top_k:
        logits = TopKLogitsWarper(settings.top_k)(None, logits)
    if settings.top_p < 1:
        logits = TopPLogitsWarper(settings.top_p)(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 5, "top_p": 0.8}],
)
def test_tokens_have_the_distribution_of_transformers(how):
    settings = SamplingSettings(max_new_tokens=1, **how)
    logits = torch.tensor([[0.3, -1.0, 2.0, 1.2, 0.0, 0.9, -0.5]])
    expected = warped(logits, settings)[0].double() * DRAWS
    sampler = TokenSampler(settings, [sample_seed(0, 0, str(how), i) for i in range(DRAWS)])
    drawn = sampler.draw(logits.expand(DRAWS, -1), torch.arange(DRAWS), 0)
    counts = torch.bincount(drawn, minlength=7).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < LIMIT[int(possible.sum()) - 1]


@pytest.mark.parametrize("how", [{"top_p": 0.95}, {"top_p": 0.3}, {"top_k": 700, "top_p": 0.9}, {"top_k": 20}, {}])
def test_a_large_vocabulary_is_cut_as_in_transformers(how):
    # Flat enough that top_p needs more tokens than the first look has.
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0))
    settings = SamplingSettings(max_new_tokens=500, **how)
    sampler = TokenSampler(settings, range(8))
    allowed = warped(logits, settings) > 0
    drawn = torch.stack([sampler.draw(logits, torch.arange(8), t) for t in range(500)])
    assert allowed[torch.arange(8).expand(500, 8), drawn].all()
    assert all(len(set(drawn[:, row].tolist())) > 15 for row in range(8))


def test_inversion_is_that_of_the_cumulative_sum():
    probabilities = torch.rand(64, 1001, generator=torch.Generator().manual_seed(1)) ** 8
    probabilities[:, ::3] = 0
    noise = torch.from_numpy(noise_of(3, 64))
    ends = probabilities.double().cumsum(-1)
    expected = (ends > noise[:, None] * ends[:, -1:]).double().argmax(-1)
    assert (invert(probabilities, noise) == expected).all()


def test_inversion_never_takes_what_has_no_probability():
    probabilities = torch.zeros(3, 600)
    probabilities[:, 300:303] = torch.tensor([1e-30, 1.0, 1e-30])
    highest = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    drawn = invert(probabilities, highest)
    assert (probabilities[torch.arange(3), drawn] > 0).all()


def test_noise_is_the_same_on_every_machine():
    # Stored samples are repeated from these numbers.
    assert noise_of(7, 3).tolist() == [0.8720734548204873, 0.29536538151378355, 0.4200976785072422]
    assert noise_of(2**62 + 5, 2).tolist() == [0.274710495178626, 0.9219948193536043]
    assert noise_of(7, 10)[:3].tolist() == noise_of(7, 3).tolist()
