"""Token log-probabilities against torch's own log-softmax, and their gradient."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.losses import Need
from prefopt.losses.divergences import divergence, named
from prefopt.scoring import Extras, token_scores
from tests.losses.test_divergences import EVERY
from tests.tolerance import rounding


def drawn(rows: int = 3, length: int = 5, vocab: int = 11, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, length, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])[:rows, :length]
    return logits.requires_grad_(), labels, mask


def test_equals_log_softmax_at_scored_positions_and_zero_elsewhere():
    logits, labels, mask = drawn()
    scores = token_scores(logits, labels, mask)
    full = torch.log_softmax(logits, -1)
    torch.testing.assert_close(scores.logps, full.gather(-1, labels.unsqueeze(-1)).squeeze(-1) * mask)
    assert torch.equal(scores.is_top1, (logits.argmax(-1) == labels) & mask.bool())
    torch.testing.assert_close(scores.entropy, torch.distributions.Categorical(logits=logits).entropy() * mask)


def test_gradient():
    logits, labels, mask = drawn()
    assert torch.autograd.gradcheck(lambda x: token_scores(x, labels, mask).logps, (logits,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, labels, mask = drawn(dtype=dtype)
    scores = token_scores(logits, labels, mask)
    assert scores.logps.dtype == torch.float32
    scores.logps.sum().backward()
    assert logits.grad.dtype == dtype
    exact, exact_labels, exact_mask = logits.detach().double().requires_grad_(), labels, mask
    token_scores(exact, exact_labels, exact_mask).logps.sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=5e-3, rtol=0)


def test_impossible_tokens_give_minus_infinity_not_nan():
    logits = torch.tensor([[[0.0, float("-inf"), 0.0]]])
    scores = token_scores(logits, torch.tensor([[1]]), torch.tensor([[1]]))
    assert scores.logps.item() == float("-inf")
    assert scores.entropy.item() == pytest.approx(0.693147, abs=5e-7 + rounding(1))


def test_the_other_tokens_have_a_gradient_where_a_token_is_certain():
    logits = torch.tensor([[[60.0, 1.0, 0.0]]], requires_grad=True)
    scores = token_scores(logits, torch.tensor([[0]]), torch.tensor([[1]]), Extras(Need.OTHERS))
    others = scores.quantities["token_others"]
    assert others.item() == pytest.approx(math.log(math.exp(-59) + math.exp(-60)), rel=1e-6)
    others.sum().backward()
    share = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([-1.0, share, 1 - share]))


def test_tokens_that_are_ruled_out_do_not_count_in_the_mean_logit():
    logits = torch.tensor([[[3.0, 1.0, -torch.inf]]], requires_grad=True)
    scores = token_scores(logits, torch.tensor([[1]]), torch.tensor([[1]]), Extras(Need.PEAK))
    scores.quantities["token_peak"].sum().backward()
    assert scores.quantities["token_peak"].item() == pytest.approx(1.0)
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([0.5, -0.5, 0.0]))


def test_shapes_must_agree():
    logits, labels, mask = drawn()
    with pytest.raises(ValueError, match="must agree in rows and positions"):
        token_scores(logits[:, :-1], labels, mask)


NEEDS = Need.TOP_K | Need.COLLISION | Need.OTHERS | Need.PEAK | Need.FORWARD_KL | Need.REVERSE_KL | Need.DIVERGENCE
EXTRAS = Extras(NEEDS, top_k=3, divergences=tuple(map(named, EVERY)))


def reference_like(logits: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (2 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)).to(logits.dtype)


def test_extras_equal_their_definitions():
    logits, labels, mask = drawn()
    reference = reference_like(logits)
    scores = token_scores(logits, labels, mask, EXTRAS, reference)
    of = scores.quantities
    p, r = torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=reference)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(of["token_forward_kl"], kl(r, p) * mask)
    torch.testing.assert_close(of["token_reverse_kl"], kl(p, r) * mask)
    torch.testing.assert_close(of["ref_token_entropy"], r.entropy() * mask)
    torch.testing.assert_close(of["token_collision"], p.probs.square().sum(-1).log() * mask)
    chances = p.probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(of["token_others"], torch.log(1 - chances) * mask)
    torch.testing.assert_close(of["token_peak"], (logits.amax(-1) - logits.mean(-1)) * mask)
    for column, name in enumerate(EVERY):
        expected = divergence(named(name), p.logits, r.logits) * mask
        torch.testing.assert_close(of["token_divergences"][..., column], expected, msg=name)
    values, ids = torch.log_softmax(logits, -1).topk(3)
    torch.testing.assert_close(of["top_logps"], values * mask.unsqueeze(-1))
    assert torch.equal(of["top_ids"], ids * mask.unsqueeze(-1))


@pytest.mark.parametrize(
    "quantity",
    [
        "logps",
        "top_logps",
        "token_others",
        "token_peak",
        "token_forward_kl",
        "token_reverse_kl",
        "token_divergences",
    ],
)
def test_gradient_of_each_quantity(quantity):
    logits, labels, mask = drawn()
    reference = reference_like(logits)

    def values(x: torch.Tensor) -> torch.Tensor:
        scores = token_scores(x, labels, mask, EXTRAS, reference)
        return scores.logps if quantity == "logps" else scores.quantities[quantity]

    # Along random directions: entry by entry, it takes two seconds each.
    assert torch.autograd.gradcheck(values, (logits,), fast_mode=True)


def test_gradients_of_all_quantities_add_up():
    logits, labels, mask = drawn()
    reference = reference_like(logits)

    def total(x: torch.Tensor) -> torch.Tensor:
        scores = token_scores(x, labels, mask, EXTRAS, reference)
        of = scores.quantities
        rest = of["token_forward_kl"].sum() - of["token_reverse_kl"].sum() + of["token_divergences"].square().sum()
        rest = rest + of["token_others"].square().sum() + of["token_peak"].square().sum()
        return scores.logps.sum() + of["top_logps"].square().sum() + rest

    assert torch.autograd.gradcheck(total, (logits,), fast_mode=True)


def test_equal_distributions_have_no_divergence_and_no_gradient():
    logits, labels, mask = drawn(dtype=torch.float32)
    scores = token_scores(logits, labels, mask, EXTRAS, logits.detach().clone())
    of = scores.quantities
    largest = float(torch.log_softmax(logits.detach(), -1).abs().max())
    assert float((of["token_forward_kl"] + of["token_reverse_kl"]).detach().abs().max()) < rounding(largest)
    assert float(of["token_divergences"].detach().abs().max()) < rounding(largest)
    (of["token_forward_kl"] + of["token_reverse_kl"] + of["token_divergences"].sum(-1)).sum().backward()
    # Every divergence adds its own slope to a logit.
    assert float(logits.grad.abs().max()) < rounding(largest, terms=2 + len(EVERY))


def test_impossible_tokens_have_no_part_in_a_divergence():
    logits = torch.tensor([[[0.0, float("-inf"), 1.0]]], requires_grad=True)
    reference = torch.tensor([[[1.0, float("-inf"), 0.0]]])
    scores = token_scores(logits, torch.tensor([[0]]), torch.tensor([[1]]), EXTRAS, reference)
    of = scores.quantities
    assert float(of["token_forward_kl"].detach()) == pytest.approx(math.tanh(0.5), rel=1e-5)
    assert torch.isfinite(of["token_divergences"]).all()
    (of["token_forward_kl"] + of["token_reverse_kl"] + of["token_divergences"].sum(-1)).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_what_extras_need_is_asked_for():
    logits, labels, mask = drawn()
    with pytest.raises(ValueError, match="needs ref_logits"):
        token_scores(logits, labels, mask, Extras(Need.FORWARD_KL))
    with pytest.raises(ValueError, match="top_k=99 exceeds the vocabulary of 11"):
        token_scores(logits, labels, mask, Extras(Need.TOP_K, top_k=99))


def test_distribution_equals_its_definition():
    logits, labels, mask = drawn()
    of = token_scores(logits.detach(), labels, mask, Extras(statistics=False, distribution=True)).quantities
    scores = torch.log_softmax(logits.detach(), -1)
    means = (scores.exp() * scores).sum(-1)
    deviations = ((scores.exp() * scores**2).sum(-1) - means**2).sqrt()
    assert torch.equal(of["predicted_ids"], logits.argmax(-1) * mask)
    torch.testing.assert_close(of["mean_logps"], means * mask)
    torch.testing.assert_close(of["logp_deviations"], deviations * mask)


def test_distribution_with_impossible_tokens_and_where_the_model_is_certain():
    infinity = float("inf")
    logits = torch.tensor([[[0.0, -infinity, 0.0], [-infinity, 3.0, -infinity], [60.0, 0.0, 0.0]]])
    of = token_scores(
        logits, torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3), Extras(distribution=True)
    ).quantities
    assert of["predicted_ids"].tolist() == [[0, 1, 0]]
    torch.testing.assert_close(of["mean_logps"], torch.tensor([[-math.log(2), 0.0, 0.0]]))
    # Of the last, 2 exp(-60) * 60^2: in float32 the difference of two squares would be 0 or NaN.
    expected = torch.tensor([[0.0, 0.0, (2 * math.exp(-60)) ** 0.5 * 60]])
    torch.testing.assert_close(of["logp_deviations"], expected, rtol=1e-4, atol=1e-12)
