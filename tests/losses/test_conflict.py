"""Gradients combined without conflict, and of normalised answers: hand-worked vectors, published formulas, losses that
really conflict."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from prefopt.losses import PreferenceBatch, Scores, parse
from prefopt.losses.conflict import coefficients, combined, gram_of


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


def test_no_term_with_a_gradient_is_an_error_that_names_them():
    policy = torch.tensor([2.0, 1.9, 0.0], dtype=torch.float64, requires_grad=True)
    loss = parse("conflict_free(npo(beta=1.0) + sft(nll='mean'))")
    with pytest.raises(ValueError, match=r"no term of conflict_free\(.*\) has a gradient \(npo, sft\)"):
        loss.backward(batch_of(policy.detach()), [policy])


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
    ],
)
def test_it_must_be_the_outermost_loss_around_a_sum(expression, problem):
    with pytest.raises(ValueError, match=problem):
        parse(expression)


# ---- answers' gradients, normalised ---------------------------------------------------------------------------------


def linear(chosen: list[list[float]], rejected: list[list[float]], weight: list[float] | None = None):
    """Parameters at 0, and pairs whose log-probabilities have these gradients; DPO's push is beta / 2 on each."""
    parameters = torch.zeros(len(chosen[0]), dtype=torch.float64, requires_grad=True)
    count = len(chosen)
    ones, zeros = torch.ones(count, dtype=torch.long), torch.zeros(count, dtype=torch.float64)
    columns = {} if weight is None else {"weight": torch.tensor(weight, dtype=torch.float64)}
    sides = [
        Scores(torch.tensor(rows, dtype=torch.float64) @ parameters, ones, zeros, columns=columns)
        for rows in (chosen, rejected)
    ]
    return PreferenceBatch(*sides), parameters


def normalised_gradient(expression: str, batch: PreferenceBatch, parameters: torch.Tensor) -> torch.Tensor:
    parameters.grad = None
    output = parse(f"pair_normalized({expression})").normalized(batch, [parameters])
    assert float(output.loss.detach()) == float(parse(expression)(batch).loss.detach())
    output.loss.backward()
    return parameters.grad


def test_each_answers_gradient_has_the_weight_of_its_inverse_norm():
    # DPO pushes by beta / 2 = 0.1 both ways: -(0.1 (3, 4) / 5 - 0.1 (0, 2) / 2).
    batch, parameters = linear([[3, 4]], [[0, 2]])
    expected = torch.tensor([-0.06, 0.02], dtype=torch.float64)
    torch.testing.assert_close(normalised_gradient("dpo(beta=0.2)", batch, parameters), expected)
    # A further pair, which counts three times as much: the mean over pairs, each with its own norms.
    batch, parameters = linear([[3, 4], [0, 5]], [[0, 2], [8, 6]], weight=[1.0, 3.0])
    further = torch.tensor([3 * 0.08, -3 * 0.04], dtype=torch.float64)
    torch.testing.assert_close(normalised_gradient("dpo(beta=0.2)", batch, parameters), (expected + further) / 2)


@pytest.mark.parametrize("expression", ["dpo(beta=0.2)", "simpo(beta=2.0, gamma=1.0)", "orpo + 0.2*sft", "hinge"])
def test_gradients_of_length_one_give_the_loss_itself(expression):
    batch, parameters = linear([[0.6, 0.8], [1, 0]], [[0, -1], [-0.8, 0.6]])
    sides = (replace(scores, logps=scores.logps - 3.0) for scores in (batch.chosen, batch.rejected))
    batch = PreferenceBatch(*sides)  # log-probabilities of 0 have no odds
    (plain,) = torch.autograd.grad(parse(expression)(batch).loss, parameters, retain_graph=True)
    torch.testing.assert_close(normalised_gradient(expression, batch, parameters), plain)


def test_a_step_that_lowered_both_answers_raises_the_chosen_one():
    """Nearly parallel gradients, the rejected one longer: gradient entanglement, and its remedy."""
    up, down = [1.0, 0.1], [3.0, 0.0]
    batch, parameters = linear([up], [down])
    (plain,) = torch.autograd.grad(parse("dpo")(batch).loss, parameters, retain_graph=True)
    chosen, rejected = (torch.tensor(side, dtype=torch.float64) for side in (up, down))
    assert -plain @ chosen < 0
    assert -plain @ rejected < 0
    own = normalised_gradient("dpo", batch, parameters)
    assert -own @ chosen > 0
    assert -own @ rejected < 0


def test_an_answer_without_a_gradient_and_a_pair_past_the_hinge_add_nothing():
    batch, parameters = linear([[0, 0]], [[0, 2]])
    expected = torch.tensor([0.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(normalised_gradient("dpo(beta=0.2)", batch, parameters), expected)
    batch, parameters = linear([[3, 4]], [[0, 2]])
    far = replace(batch, chosen=replace(batch.chosen, logps=batch.chosen.logps + 100))
    assert normalised_gradient("hinge(beta=1.0)", far, parameters).tolist() == [0.0, 0.0]


def test_half_precision_parameters_get_their_own_precision():
    parameters = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    sides = (Scores((parameters * torch.tensor(g)).sum().float()[None], torch.ones(1), torch.zeros(1)) for g in (2, 3))
    parse("pair_normalized(dpo)").normalized(PreferenceBatch(*sides), [parameters]).loss.backward()
    assert parameters.grad.dtype == torch.bfloat16


def test_log_probabilities_without_a_gradient_are_refused():
    batch, parameters = linear([[3, 4]], [[0, 2]])
    bare = replace(batch, chosen=replace(batch.chosen, logps=batch.chosen.logps.detach()))
    with pytest.raises(ValueError, match=r"no gradient, so pair_normalized\(.*\) has none to normalise"):
        parse("pair_normalized(dpo)").normalized(bare, [parameters])


@pytest.mark.parametrize(
    ("inner", "problem"),
    [
        ("sft", "must compare the chosen and the rejected answer"),
        ("kto", "must compare the chosen and the rejected answer"),
        ("plackett_luce", "must compare the chosen and the rejected answer"),
        ("humanline(dpo)", "must work on log-probabilities of whole answers.* needs tokens"),
        ("beta_dpo", "must be a mean over pairs, without state"),
        ("dpo + sft(nll='token')", "must be a mean over pairs"),
        ("conflict_free(dpo + sft)", "loss cannot be conflict_free"),
    ],
)
def test_what_cannot_be_normalised_is_refused(inner, problem):
    with pytest.raises(ValueError, match=problem):
        parse(f"pair_normalized({inner})")
