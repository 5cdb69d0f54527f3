"""Token log-probabilities against torch's own log-softmax, and their gradient."""

from __future__ import annotations

import pytest
import torch

from prefopt.scoring import token_scores


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
    assert scores.entropy.item() == pytest.approx(0.693147)


def test_shapes_must_agree():
    logits, labels, mask = drawn()
    with pytest.raises(ValueError, match="must agree in rows and positions"):
        token_scores(logits[:, :-1], labels, mask)
