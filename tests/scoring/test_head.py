"""The head on scored tokens, a chunk at a time, against whole logits: the same values, the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prefopt.losses import Need
from prefopt.losses.divergences import named
from prefopt.scoring import Extras, head, score_rows
from prefopt.scoring.call import Call
from prefopt.scoring.head import Head, Kept, head_of, measured_by_head
from prefopt.scoring.logprobs import scores_of_logits
from prefopt.scoring.measure import DIFFERENTIABLE
from tests.losses.test_divergences import EVERY
from tests.scoring.test_tree import collate, gradient, model_inputs
from tests.tiny import make_model

N, H, V = 11, 6, 23
NEEDS = Need.TOP_K | Need.COLLISION | Need.OTHERS | Need.PEAK | Need.FORWARD_KL | Need.REVERSE_KL | Need.DIVERGENCE
ALL = Extras(NEEDS, top_k=3, divergences=tuple(map(named, EVERY)))


@pytest.fixture(params=[1, 4, 100], ids=["one by one", "some", "all at once"])
def chunk(request, monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", request.param * 4 * V)
    return request.param


def make_head(bias: bool = False, trained: bool = False, softcap: float | None = None) -> Head:
    torch.manual_seed(0)
    linear = nn.Linear(H, V, bias=bias).double().requires_grad_(trained)
    return Head(linear, softcap)


def total(measured, extras: Extras) -> torch.Tensor:
    """A scalar in which every value counts differently."""
    values = [measured[name] for name in DIFFERENTIABLE if name in measured]
    return sum((v * torch.linspace(0.5, 1.5, v.numel()).reshape(v.shape).double()).sum() for v in values)


@pytest.mark.parametrize("extras", [Extras(), ALL], ids=["log-probabilities", "everything"])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"trained": True, "bias": True}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("kept", [0, 2**30], ids=["logits again", "logits kept"])
def test_equals_whole_logits(chunk, extras, options, kept, monkeypatch):
    monkeypatch.setattr(head, "KEPT_BYTES", kept)
    made = make_head(**options)
    states = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (N,))
    other = torch.randn(N, V, dtype=torch.float64)
    reference = Kept(other) if extras.full_reference else None
    leaves = [states, *(p for p in made.linear.parameters() if p.requires_grad)]

    mine = measured_by_head(made, states, labels, extras, reference)
    mine_grads = torch.autograd.grad(total(mine, extras), leaves)
    mask = torch.ones(1, N, dtype=torch.bool)
    logits = made.linear(states)
    logits = logits if made.softcap is None else made.softcap * torch.tanh(logits / made.softcap)
    theirs = scores_of_logits(logits[None], labels[None], mask, extras, other[None])
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], msg=name)
    for one, two in zip(mine_grads, torch.autograd.grad(total(theirs, extras), leaves), strict=True):
        torch.testing.assert_close(one, two)


def test_gradcheck(chunk):
    for options in ({}, {"trained": True, "bias": True}):
        made = make_head(**options)
        states = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(0, V, (N,))
        assert torch.autograd.gradcheck(
            lambda x, m=made, y=labels: measured_by_head(m, x, y, Extras())["logps"], states
        )


def test_a_head_that_is_left_alone_keeps_no_logits(chunk):
    """What is kept for the backward pass does not grow with the vocabulary."""
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    states = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        measured_by_head(make_head(), states, torch.randint(0, V, (N,)), Extras())
    assert max(kept) <= N * H


def test_impossible_tokens_have_an_entropy():
    logits = torch.randn(1, 3, V, dtype=torch.float64)
    logits[..., 5:] = -torch.inf
    scores = scores_of_logits(logits, torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
    expected = torch.distributions.Categorical(logits=logits[0, :, :5]).entropy()
    torch.testing.assert_close(scores["entropy"], expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "gpt2", "phi", "moe"])
def test_models_give_the_same_scores_with_it(architecture):
    model = make_model(architecture).eval()
    if architecture == "gemma2":
        model.set_attn_implementation("eager")
    batch = collate()
    inputs, mask = model_inputs(batch), batch["completion_mask"]
    whole, chunked = (score_rows(model, inputs, mask, call=Call(chunked_head=kind))[0] for kind in (False, True))
    assert head_of(model) is not None
    torch.testing.assert_close(chunked.logps, whole.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked.entropy, whole.entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(chunked.is_top1, whole.is_top1)
    one, two = gradient(model, chunked), gradient(model, whole)
    assert float((one - two).norm() / two.norm()) < 1e-5
    # The head is itself again.
    assert model(input_ids=batch["input_ids"]).logits.shape[-1] == model.config.get_text_config().vocab_size


def test_heads_that_are_no_plain_layer_are_left_alone():
    model = make_model()
    model.config.logit_scale = 0.5
    assert head_of(model) is None
    model.config.logit_scale = None
    assert head_of(model) is not None
    model.lm_head = nn.Sequential(model.lm_head)
    assert head_of(model) is None
    assert head_of(nn.Linear(2, 2)) is None


def test_bfloat16_accumulates_in_float32():
    model = make_model(dtype=torch.bfloat16).eval()
    batch = collate()
    scores, _ = score_rows(model, model_inputs(batch), batch["completion_mask"])
    assert scores.logps.dtype == torch.float32
    plain, _ = score_rows(model, model_inputs(batch), batch["completion_mask"], call=Call(chunked_head=False))
    torch.testing.assert_close(scores.logps, plain.logps, rtol=1e-3, atol=1e-2)


def test_autocast():
    model = make_model().eval()
    batch = collate()
    gradients = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kind in (True, False):
            scores, _ = score_rows(model, model_inputs(batch), batch["completion_mask"], call=Call(chunked_head=kind))
            gradients.append((scores.logps.detach(), gradient(model, scores)))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-2, atol=3e-2)
    assert float((gradients[0][1] - gradients[1][1]).norm() / gradients[1][1].norm()) < 0.05


def test_a_divergence_of_equals_has_no_gradient_in_half_precision_either(chunk):
    torch.manual_seed(0)
    made = Head(nn.Linear(H, V, bias=False).requires_grad_(False))
    states = torch.randn(N, H, requires_grad=True)
    extras = Extras(Need.FORWARD_KL | Need.REVERSE_KL | Need.DIVERGENCE, divergences=tuple(map(named, EVERY)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = measured_by_head(made, states, torch.randint(0, V, (N,)), extras, Kept(states.detach(), made))
    assert float(measured["token_forward_kl"].abs().max()) < 1e-5
    assert float(measured["token_divergences"].abs().max()) < 1e-5
    (
        measured["token_forward_kl"].sum() + measured["token_reverse_kl"].sum() + measured["token_divergences"].sum()
    ).backward()
    assert float(states.grad.abs().max()) < 1e-4


def test_a_head_with_a_forward_of_its_own_keeps_it():
    model = make_model()
    own = model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight)
    assert head_of(model) is None
    batch = collate()
    score_rows(model, model_inputs(batch), batch["completion_mask"])
    assert model.lm_head.forward is own
