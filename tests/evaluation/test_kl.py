"""KL from a reference on a model's own samples: exact where the answer is one token, zero for the model itself."""

from __future__ import annotations

import copy

import pytest
import torch

from prefopt.evaluation.kl import kl_of_samples
from tests.tiny import make_model, make_tokenizer

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]


@pytest.fixture(scope="module")
def models():
    model = make_model("llama").eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model, other


def test_one_token_has_the_exact_kl_of_the_next_token(models):
    model, other = models
    values = kl_of_samples(model, other, make_tokenizer(), PROMPTS, 1)
    with torch.no_grad():
        for prompt, value in zip(PROMPTS, values, strict=True):
            p, q = (one(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for one in models)
            assert value == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


def test_answers_of_several_tokens_have_the_mean_log_ratio(models):
    # Chain rule: E[sum of exact KL of each next token] = E[log-ratio of answers]; here over all two-token answers.
    model, other = models
    ends = {int(make_tokenizer().eos_token_id)}
    with torch.no_grad():
        first_p, first_q = (one(torch.tensor([PROMPTS[0]])).logits[0, -1].double().log_softmax(-1) for one in models)
        rows = torch.tensor([[*PROMPTS[0], token] for token in range(len(first_p))])
        p, q = (one(rows).logits[:, -1].double().log_softmax(-1) for one in models)
        second = (p.exp() * (p - q)).sum(-1)
    goes_on = torch.tensor([token not in ends for token in range(len(first_p))])
    expected = float((first_p.exp() * (first_p - first_q)).sum() + (first_p.exp() * second * goes_on).sum())
    values = torch.tensor(kl_of_samples(model, other, make_tokenizer(), PROMPTS[:1] * 400, 2))
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / 20


def test_a_model_has_no_distance_from_itself_and_is_left_as_it_was(models):
    model = models[0].train()
    before = torch.get_rng_state()
    assert kl_of_samples(model, copy.deepcopy(model), make_tokenizer(), PROMPTS, 5) == pytest.approx(
        [0, 0, 0], abs=1e-5
    )
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    model.eval()


def test_a_seed_repeats_its_draws(models):
    first, again, other = (kl_of_samples(*models, make_tokenizer(), PROMPTS, 6, seed) for seed in (0, 0, 1))
    assert first == again != other
