"""The divergences: their definitions in plain floats, the identities between them, and their slopes."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.losses.divergences import GENERATORS, NAMES, Divergence, divergence, named, slope
from tests.tolerance import rounding

EVERY = (
    "kl", "js", "hellinger", "renyi(0.9)", "renyi(0.5)", "renyi(2.0)", "renyi(1.0)", "bhattacharyya", "wasserstein",
    "f(forward_kl)", "f(total_variation)", "f(triangular)",
)  # fmt: skip
every = pytest.mark.parametrize("text", EVERY)


def drawn(n: int = 40, vocabulary: int = 9, spread: float = 2.0, dtype: torch.dtype = torch.float64):
    """(n, V) log-probabilities of two distributions."""
    draw = torch.Generator().manual_seed(0)
    return tuple(
        torch.log_softmax(spread * torch.randn(n, vocabulary, generator=draw, dtype=torch.float64), -1).to(dtype)
        for _ in range(2)
    )


def value(text: str, log_p: torch.Tensor, log_r: torch.Tensor) -> torch.Tensor:
    return divergence(named(text), log_p, log_r)


def plain(text: str, p: list[float], r: list[float]) -> float:
    """The definition, in Python floats."""
    both = list(zip(p, r, strict=True))
    overlap = sum(math.sqrt(a * b) for a, b in both)

    def kl(pairs: list[tuple[float, float]]) -> float:
        return sum(a * math.log(a / b) for a, b in pairs)

    if text.startswith("renyi"):
        order = named(text).order
        if order == 1:
            return kl(both)
        return math.log(sum(a**order * b ** (1 - order) for a, b in both)) / (order - 1)
    if text == "wasserstein":
        # Mass is moved one place at a time: what has to pass from the k-th to the next.
        ranked = sorted(both, key=lambda pair: -pair[1])
        return sum(abs(sum(a - b for a, b in ranked[:k])) * math.log((k + 1) / k) for k in range(1, len(ranked)))
    return {
        "kl": lambda: kl(both),
        "js": lambda: (kl([(a, (a + b) / 2) for a, b in both]) + kl([(b, (a + b) / 2) for a, b in both])) / 2,
        "hellinger": lambda: 1 - overlap,
        "bhattacharyya": lambda: -math.log(overlap),
        "f(forward_kl)": lambda: kl([(b, a) for a, b in both]),
        "f(total_variation)": lambda: sum(abs(a - b) for a, b in both) / 2,
        "f(triangular)": lambda: sum((a - b) ** 2 / (a + b) for a, b in both) / 2,
    }[text]()


@every
def test_equals_its_definition(text):
    log_p, log_r = drawn()
    expected = [plain(text, p, r) for p, r in zip(log_p.exp().tolist(), log_r.exp().tolist(), strict=True)]
    torch.testing.assert_close(value(text, log_p, log_r), torch.tensor(expected, dtype=torch.float64))


def test_every_divergence_of_the_paper_is_there():
    assert len(NAMES) == 7
    assert {named(text).name for text in EVERY} == set(NAMES)
    assert {named(text).f for text in EVERY} == {None, *GENERATORS}


class TestIdentities:
    def test_jensen_shannon_is_at_most_log_2(self):
        log_p, log_r = drawn(spread=30.0)
        js = value("js", log_p, log_r)
        assert float(js.max()) <= math.log(2) + 1e-12
        assert float(js.max()) > 0.69  # and comes close where the two share nothing
        torch.testing.assert_close(js, value("js", log_r, log_p))

    def test_bhattacharyya_follows_from_hellinger(self):
        log_p, log_r = drawn()
        torch.testing.assert_close(
            value("bhattacharyya", log_p, log_r), -torch.log(1 - value("hellinger", log_p, log_r))
        )

    def test_renyi_tends_to_kl_and_is_twice_bhattacharyya_at_a_half(self):
        log_p, log_r = drawn(spread=1.0)
        kl = value("kl", log_p, log_r)
        for order in (0.9999, 1.0001):
            torch.testing.assert_close(divergence(Divergence("renyi", order), log_p, log_r), kl, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(value("renyi(1.0)", log_p, log_r), kl)
        torch.testing.assert_close(value("renyi(0.5)", log_p, log_r), 2 * value("bhattacharyya", log_p, log_r))

    def test_renyi_grows_with_its_order(self):
        log_p, log_r = drawn()
        values = torch.stack([divergence(Divergence("renyi", order), log_p, log_r) for order in (0.2, 0.9, 1, 2, 5)])
        assert (values.diff(dim=0) > 0).all()

    @every
    def test_zero_for_equal_distributions_alone(self, text):
        log_p, log_r = drawn()
        assert float(value(text, log_p, log_p).abs().max()) < 1e-12
        assert float(slope(named(text), log_p, log_p).abs().max()) < 1e-12
        assert float(value(text, log_p, log_r).min()) > 1e-3
        # Two tokens that the reference finds equally likely are told apart too.
        even = torch.log(torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64))
        moved = torch.log(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))
        assert float(value(text, moved, even)) > 1e-3

    def test_wasserstein_by_hand(self):
        r = torch.log(torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64))
        p = torch.log(torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64))
        # 0.2 goes from the second likeliest of the reference to its third.
        assert float(value("wasserstein", p, r)) == pytest.approx(0.2 * math.log(3 / 2))


@every
def test_slope_is_the_gradient_of_the_logits(text):
    log_p, log_r = drawn()
    logits = (log_p + 0.7).requires_grad_()
    kind = named(text)
    made = divergence(kind, torch.log_softmax(logits, -1), log_r)
    (gradient,) = torch.autograd.grad(made.sum(), logits)
    torch.testing.assert_close(slope(kind, log_p, log_r), gradient)
    assert torch.autograd.gradcheck(lambda x: divergence(kind, torch.log_softmax(x, -1), log_r), logits)


@every
def test_a_large_vocabulary_in_float32_keeps_zero_zero(text):
    log_p, log_r = drawn(2, 50_000, dtype=torch.float32)
    # Probabilities add up to one, of which sums in blocks keep all but a few roundings.
    assert float(value(text, log_p, log_p.clone()).abs().max()) < rounding(1, terms=16)
    assert torch.isfinite(value(text, log_p, log_r)).all()
    exact = value(text, log_p.double(), log_r.double())
    torch.testing.assert_close(value(text, log_p, log_r).double(), exact, rtol=1e-3, atol=1e-5)


@every
def test_far_apart_stays_finite_and_impossible_tokens_add_nothing(text):
    far = torch.tensor([[0.0, -200.0, -300.0]]), torch.tensor([[-300.0, -200.0, 0.0]])
    log_p, log_r = (torch.log_softmax(part, -1).requires_grad_() for part in far)
    if text != "renyi(2.0)":  # its log-ratio itself is what is large
        assert torch.isfinite(value(text, log_p, log_r)).all()
    assert torch.isfinite(slope(named(text), log_p.detach(), log_r.detach())).all()
    # A token ruled out under both.
    without, ruled_out = drawn(3, 4), [torch.cat([part, torch.full((3, 1), -torch.inf)], -1) for part in drawn(3, 4)]
    torch.testing.assert_close(value(text, *ruled_out), value(text, *without))
    torch.testing.assert_close(slope(named(text), *ruled_out)[:, :4], slope(named(text), *without))


@every
def test_names_are_read_back(text):
    assert str(named(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kullback", "must be one of kl, js"),
        ("renyi", "needs an order"),
        ("renyi(x)", "positive finite number, got 'x'"),
        ("renyi(-1)", "positive finite number"),
        ("f", "needs one of forward_kl"),
        ("f(cosine)", "must be one of forward_kl"),
        ("kl(2)", "takes none"),
    ],
)
def test_names_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        named(text)
