"""Gradients combined without conflict: hand-worked vectors, the published formulas, losses that really conflict."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from prefopt.losses import PreferenceBatch, Scores, parse
from prefopt.losses.conflict import TermMoments, coefficients, combined, gram_of


def combine(vectors: list[list[float]], method: str) -> torch.Tensor:
    gradients = [[torch.tensor(vector, dtype=torch.float64)] for vector in vectors]
    (made,) = combined(gradients, coefficients(gram_of(gradients), method))
    return made


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def published_config(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """ConFIG of two gradients as the paper's eq. 5 has it, from the parts of each that are orthogonal to the other."""

    def orthogonal(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return other - (one @ other) / (one @ one) * one

    direction = unit(unit(orthogonal(first, second)) + unit(orthogonal(second, first)))
    return (first @ direction + second @ direction) * direction


def published_pcgrad(gradients: list[torch.Tensor]) -> torch.Tensor:
    kept = [gradient.clone() for gradient in gradients]
    for i in range(len(gradients)):
        for j, other in enumerate(gradients):
            if i != j and kept[i] @ other < 0:
                kept[i] = kept[i] - (kept[i] @ other) / (other @ other) * other
    return torch.stack(kept).sum(0)


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_config_by_hand():
    # (3, 0) and (-1, 1): the direction at equal angles is that of (1, 1 + sqrt 2), 67.5 degrees from both.
    direction = unit(torch.tensor([1.0, 1 + math.sqrt(2)], dtype=torch.float64))
    cosine = math.cos(math.radians(67.5))
    expected = (3 + math.sqrt(2)) * cosine * direction
    torch.testing.assert_close(combine([[3, 0], [-1, 1]], "config"), expected)


def test_pcgrad_by_hand():
    # (3, 0) loses its part along (-1, 1): (3, 0) + 3/2 (-1, 1) = (1.5, 1.5); (-1, 1) that along (3, 0): (0, 1).
    torch.testing.assert_close(combine([[3, 0], [-1, 1]], "pcgrad"), torch.tensor([1.5, 2.5], dtype=torch.float64))


def test_balance_by_hand():
    # Lengths 3 and 1 become 2 and 2.
    torch.testing.assert_close(combine([[3, 0], [0, -1]], "balance"), torch.tensor([2.0, -2.0], dtype=torch.float64))


@pytest.mark.parametrize("method", ["config", "pcgrad"])
def test_gradients_of_one_direction_are_added(method):
    torch.testing.assert_close(combine([[1, 2], [2, 4]], method), torch.tensor([3.0, 6.0], dtype=torch.float64))


@pytest.mark.parametrize("method", ["config", "pcgrad", "balance"])
def test_equal_lengths_at_right_angles_are_added(method):
    torch.testing.assert_close(combine([[2, 0], [0, 2]], method), torch.tensor([2.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("method", ["config", "pcgrad"])
def test_opposed_gradients_cancel(method):
    torch.testing.assert_close(combine([[2, 1], [-4, -2]], method), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("method", ["config", "pcgrad", "balance"])
def test_a_term_without_a_gradient_leaves_the_others_alone(method):
    gradients = [[torch.tensor([1.0, -2.0])], [None], [torch.zeros(2)]]
    weights = coefficients(gram_of(gradients), method)
    torch.testing.assert_close(combined(gradients, weights)[0], torch.tensor([1.0, -2.0]))
    assert combined([[None], [None]], coefficients(gram_of([[None], [None]]), method)) == [None]


# ---- as published ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_two_gradients_as_published(seed):
    torch.manual_seed(seed)
    first, second = torch.randn(7, dtype=torch.float64), 10 * torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(combine([first.tolist(), second.tolist()], "config"), published_config(first, second))
    torch.testing.assert_close(combine([first.tolist(), second.tolist()], "pcgrad"), published_pcgrad([first, second]))


@pytest.mark.parametrize("count", [3, 5])
def test_many_gradients(count):
    torch.manual_seed(count)
    gradients = [torch.randn(9, dtype=torch.float64) * 10**i for i in range(count)]
    made = combine([gradient.tolist() for gradient in gradients], "config")
    cosines = torch.stack([unit(gradient) @ unit(made) for gradient in gradients])
    # The same angle with all; as the least-squares solution of U v = 1 has it; as long as the projections add up to.
    torch.testing.assert_close(cosines, cosines[:1].expand(count))
    assert cosines[0] > 0
    units = torch.stack([unit(gradient) for gradient in gradients])
    solution = torch.linalg.lstsq(units, torch.ones(count, 1, dtype=torch.float64)).solution.squeeze(1)
    torch.testing.assert_close(unit(made), unit(solution))
    torch.testing.assert_close(made.norm(), torch.stack([gradient @ unit(made) for gradient in gradients]).sum())
    torch.testing.assert_close(
        combine([gradient.tolist() for gradient in gradients], "pcgrad"), published_pcgrad(gradients)
    )


# ---- losses that conflict -------------------------------------------------------------------------------------------


def two_quadratics(method: str | None, steps: int = 200) -> list[float]:
    """A steep and a flat bowl with different minima, descended from a point where their gradients disagree."""
    bowls = [(100.0, torch.tensor([0.0, 0.0])), (1.0, torch.tensor([1.0, 2.0]))]
    x = torch.tensor([0.5, 3.0], dtype=torch.float64)
    # The steep bowl sees the first coordinate alone, so both can be low at (0, 2).
    scale = torch.tensor([1.0, 0.0], dtype=torch.float64)
    values = []
    for _ in range(steps + 1):
        x.requires_grad_()
        terms = [
            bowls[0][0] * (scale * (x - bowls[0][1])).square().sum() / 2,
            bowls[1][0] * (x - bowls[1][1]).square().sum() / 2,
        ]
        gradients = [list(torch.autograd.grad(term, [x])) for term in terms]
        values.append([float(term.detach()) for term in terms])
        weights = torch.ones(2) if method is None else coefficients(gram_of(gradients), method)
        x = (x - 0.002 * combined(gradients, weights)[0]).detach()
    return values


def test_plain_descent_raises_the_flat_bowl_first_and_config_lowers_both():
    start, *plain = two_quadratics(None, steps=20)
    assert plain[-1][0] < start[0]
    assert max(value for _, value in plain) > start[1]
    for method in ("config", "pcgrad"):
        start, *path = two_quadratics(method, steps=20)
        assert all(a < b for a, b in zip(path[-1], start, strict=True)), method
    for before, after in itertools.pairwise(two_quadratics("config", steps=20)):
        assert all(a < b for a, b in zip(after, before, strict=True))


def batch_of(policy: torch.Tensor) -> PreferenceBatch:
    """Three responses of one token: 0 to be forgotten, 1 to be retained."""
    logps = torch.log_softmax(policy, -1)
    one, reference = torch.ones(1, dtype=torch.long), torch.full((1,), -math.log(3), dtype=torch.float64)
    return PreferenceBatch(chosen=Scores(logps[1:2], one, reference), rejected=Scores(logps[:1], one, reference))


def test_a_loop_of_ones_own_calls_backward():
    loss = parse("conflict_free(npo(beta=1.0) + sft(nll='mean'))")
    policy = torch.tensor([2.0, 1.9, 0.0], dtype=torch.float64, requires_grad=True)
    output = loss.backward(batch_of(policy), [policy])
    assert float(output.loss.detach()) == pytest.approx(sum(float(term.detach()) for term in output.terms))
    fresh = policy.detach().requires_grad_()
    first, second = (torch.autograd.grad(term, fresh, retain_graph=True)[0] for term in loss(batch_of(fresh)).terms)
    torch.testing.assert_close(policy.grad, published_config(first, second))
    loss.backward(batch_of(policy), [policy])
    torch.testing.assert_close(policy.grad, 2 * published_config(first, second))


def test_a_term_that_is_constant_is_no_obstacle():
    loss = parse("conflict_free(hinge(beta=1.0) + sft(nll='mean'))")
    policy = torch.tensor([-9.0, 9.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss.backward(batch_of(policy), [policy])
    (expected,) = torch.autograd.grad(parse("sft(nll='mean')")(batch_of(policy)).loss, policy)
    torch.testing.assert_close(policy.grad, expected)


# ---- one term a step ------------------------------------------------------------------------------------------------

AUTHORS = {
    "config": [
        [0.5, 3.0],
        [0.4000000000707781, 2.900000000043743],
        [0.3011445809587974, 2.8011445809023106],
        [0.2091483033287665, 2.703275466111506],
        [0.1246504808636475, 2.6135705002257286],
        [0.05279145600516724, 2.5262574192165363],
        [-0.006920647749598781, 2.453733354282401],
        [-0.05433918880141396, 2.385116132018789],
        [-0.09051596955535032, 2.3331001998071494],
        [-0.11844691487291295, 2.2850835776195195],
    ],
    "pcgrad": [
        [0.5, 3.0],
        [0.400000000025, 2.900000000047619],
        [0.30118741963948015, 2.8010952761821524],
        [0.20575725284112864, 2.701762451618173],
        [0.11880172915669474, 2.6107008734665786],
        [0.040474374039789374, 2.5168129210054957],
        [-0.023044153981188864, 2.439512840914254],
        [-0.0755930776742902, 2.360391719184282],
        [-0.11369696251116246, 2.3022573811956892],
        [-0.14349846595763352, 2.245077569120229],
    ],
}
"""Ten steps of conflictfree 0.1.8's PseudoMomentumOperator from (0.5, 3) on the two bowls of `one_bowl`, one a step in
turn, in float64: its default betas, a rate of 0.1, steps of plain descent along what it returns."""


def one_bowl(x: torch.Tensor, number: int) -> torch.Tensor:
    center = torch.tensor([1.0, 2.0], dtype=x.dtype)
    return 50 * x[0] ** 2 if number == 0 else (x - center).square().sum() / 2


@pytest.mark.parametrize("method", AUTHORS)
def test_adam_on_what_momentum_returns_takes_the_authors_steps(method):
    x = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    moments = TermMoments(2, method, momentum=0.9)
    for step, expected in enumerate(AUTHORS[method]):
        assert moments.turn == step % 2
        (x.grad,) = moments.step(torch.autograd.grad(one_bowl(x, moments.turn), x))
        optimizer.step()
        torch.testing.assert_close(x.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def vector(*numbers: float) -> list[torch.Tensor | None]:
    return [torch.tensor(numbers, dtype=torch.float64)]


@pytest.mark.parametrize(("adam", "third"), [(False, 8 / 3), (True, 3.0)])
def test_momentum_by_hand(adam, third):
    # Moments (1, 0) and (0, 1) after a step each, corrected by 1 - 0.5 to the gradients themselves, whose sum it is.
    # Then m_0 = 0.5 * 1 + 0.5 * 4 = 2.5, corrected by 1 - 0.25: (10/3, 0) and (0, 2). At right angles, the direction
    # is (1, 1), the projections add up to (10/3 + 2) / sqrt 2: (8/3, 8/3). Adam's own moment was 0.5 * 2 = 1 and is to
    # be 0.75 * 8/3 = 2, for which it needs (2 - 0.5 * 1) / 0.5 = 3.
    moments = TermMoments(2, "config", momentum=0.5)
    assert moments.step(vector(2, 0), adam) == [None]
    assert moments.gram is None
    torch.testing.assert_close(moments.step(vector(0, 2), adam), vector(2, 2))
    torch.testing.assert_close(moments.step(vector(4, 0), adam), vector(third, third))
    torch.testing.assert_close(moments.gram, torch.tensor([[100 / 9, 0], [0, 4]], dtype=torch.float64))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("count", [2, 3])
def test_adams_own_moment_becomes_the_combined_one(count, momentum):
    torch.manual_seed(count)
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([x], betas=(momentum, 0.99))
    ours, plain = (TermMoments(count, "config", momentum) for _ in range(2))
    for step in range(12):
        gradient = [torch.randn(5, dtype=torch.float64) * 10 ** (step % count)]
        (x.grad,), (expected,) = ours.step(gradient), plain.step(gradient, adam=False)
        optimizer.step()
        if step < count - 1:
            assert x.grad is None
            assert expected is None
            assert not optimizer.state
        else:
            scale = 1 - momentum ** (step - count + 2)
            torch.testing.assert_close(optimizer.state[x]["exp_avg"] / scale, expected)


def test_gradients_that_never_change_are_combined_as_without_momentum():
    gradients = [vector(3, 0), vector(-1, 1), vector(0, -5)]
    expected = combined(gradients, coefficients(gram_of(gradients), "config"))
    for adam in (True, False):
        moments = TermMoments(3, "config", momentum=0.8)
        made = [moments.step(gradients[moments.turn], adam) for _ in range(9)]
        for found in made[2:]:
            torch.testing.assert_close(found, expected)


def test_a_term_without_a_gradient_fades_and_one_that_never_had_any_has_no_say():
    moments = TermMoments(2, "config", momentum=0.5)
    made = [moments.step(gradient, adam=False) for gradient in (vector(2, 0), [None], [None], [None], [None])]
    # The zeros are gradients as good as any: the corrected moment is 2, then 1 / 2 / (1 - 1/4), 1 / 4 / (1 - 1/8).
    for found, expected in zip(made[1:], (2, 2 / 3, 2 / 3, 2 / 7), strict=True):
        torch.testing.assert_close(found, vector(expected, 0))
    assert moments.gram[0, 1] == moments.gram[1, 1] == 0


def test_moments_of_half_precision_gradients_are_float32():
    moments = TermMoments(2, "config", momentum=0.9)
    for _ in range(4):
        (made,) = moments.step([torch.ones(3, dtype=torch.bfloat16)])
    assert made.dtype == torch.float32
    assert {value.dtype for name, value in moments.state_dict(["x"]).items() if name.endswith(".x")} == {torch.float32}


@pytest.mark.parametrize("saved_after", [0, 1, 2, 5])
def test_moments_read_back_go_on_as_if_nothing_had_happened(saved_after):
    torch.manual_seed(0)
    gradients = [[torch.randn(3), None if step % 3 == 0 else torch.randn(2)] for step in range(8)]
    whole, first, second = (TermMoments(2, "config", 0.9) for _ in range(3))
    expected = [whole.step(gradient) for gradient in gradients]
    for gradient in gradients[:saved_after]:
        first.step(gradient)
    parameters = {"a": torch.zeros(3), "b": torch.zeros(2)}
    second.load_state_dict(first.state_dict(list(parameters)), parameters)
    for step in range(saved_after, 8):
        found = second.step(gradients[step])
        assert [a is None for a in found] == [b is None for b in expected[step]]
        assert all(torch.equal(a, b) for a, b in zip(found, expected[step], strict=True) if a is not None)


def test_moments_of_something_else_are_refused():
    moments = TermMoments(2, "config", 0.9)
    moments.step([torch.ones(2)])
    state = moments.state_dict(["a"])
    with pytest.raises(ValueError, match=r"do not belong to these 2 terms and parameters: 0\.a"):
        TermMoments(2, "config", 0.9).load_state_dict(state, {"b": torch.zeros(2)})
    with pytest.raises(ValueError, match="do not belong to these 3 terms and parameters: 2 terms"):
        TermMoments(3, "config", 0.9).load_state_dict(state, {"a": torch.zeros(2)})
    moments.step([torch.ones(2)])
    with pytest.raises(ValueError, match="moments are of 1 parameters, but 2 gradients were given"):
        moments.step([torch.ones(2), torch.ones(2)])


def test_a_loop_of_ones_own_takes_one_term_a_call():
    loss = parse("conflict_free(npo(beta=1.0) + sft(nll='mean'), momentum=0.9)")
    policy = torch.tensor([2.0, 1.9, 0.0], dtype=torch.float64, requires_grad=True)
    output = loss.backward(batch_of(policy), [policy])
    assert policy.grad is None
    assert float(output.loss.detach()) == pytest.approx(sum(float(term.detach()) for term in output.terms))
    loss.backward(batch_of(policy), [policy])
    fresh = policy.detach().requires_grad_()
    first, second = (torch.autograd.grad(term, fresh, retain_graph=True)[0] for term in loss(batch_of(fresh)).terms)
    torch.testing.assert_close(policy.grad, published_config(first, second))
    assert loss.moments.taken == 2
    assert loss.new_moments().taken == 0


def test_a_loop_of_ones_own_with_momentum_lowers_both_terms():
    loss = parse("conflict_free(npo(beta=1.0) + sft(nll='mean'), momentum=0.9)")
    policy = torch.tensor([2.0, 1.9, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([policy], lr=0.05)
    start = [float(term.detach()) for term in loss(batch_of(policy)).terms]
    for _ in range(30):
        optimizer.zero_grad()
        loss.backward(batch_of(policy), [policy])
        optimizer.step()
    assert all(float(term.detach()) < before for term, before in zip(loss(batch_of(policy)).terms, start, strict=True))


# ---- where it may stand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("conflict_free(dpo)", "loss must be a sum of two losses or more"),
        ("conflict_free(2*dpo)", "loss must be a sum of two losses or more"),
        ("conflict_free(dpo + sft) + sft", "conflict_free must be the outermost loss"),
        ("2*conflict_free(dpo + sft)", "conflict_free must be the outermost loss"),
        ("wpo(conflict_free(dpo + sft))", "loss cannot be conflict_free"),
        ("conflict_free(dpo + sft, method='mgda')", "method must be 'config' or 'pcgrad' or 'balance'"),
        ("conflict_free(dpo + sft, momentum=1.0)", r"momentum must be a finite number in \[0, 1\), got 1.0"),
        ("conflict_free(dpo + sft, momentum=-0.1)", r"momentum must be a finite number in \[0, 1\), got -0.1"),
        ("conflict_free(dpo + sft, momentum=True)", "momentum"),
    ],
)
def test_it_must_be_the_outermost_loss_around_a_sum(expression, problem):
    with pytest.raises(ValueError, match=problem):
        parse(expression)
