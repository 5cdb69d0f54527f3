"""What every registered loss must satisfy. A loss without a row in `cases.CASES` fails here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prefopt.losses import Loss, Need, PreferenceBatch, Scores, available, parse
from tests.losses.cases import CASES, REFERENCE_VECTOR, Row, make_batch, random_rows

EXPRESSIONS = [case.expression for case in CASES]
WITH_TOKEN = [*EXPRESSIONS, "sft(nll='token')"]
every_case = pytest.mark.parametrize("case", CASES, ids=EXPRESSIONS)
every_loss = pytest.mark.parametrize("expression", WITH_TOKEN)


def leaves(batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    assert batch.chosen is not None
    assert batch.rejected is not None
    return batch.chosen.logps, batch.rejected.logps


def test_every_registered_loss_is_covered():
    covered = {label for text in WITH_TOKEN for _, label, _ in parse(text).terms()}
    assert covered == set(available())


@every_case
def test_value_at_the_reference_vector(case):
    assert sum(case.values(REFERENCE_VECTOR)) == pytest.approx(case.at_reference_vector, abs=6e-7)
    output = parse(case.expression)(make_batch([REFERENCE_VECTOR]))
    assert float(output.per_example.sum()) == pytest.approx(case.at_reference_vector, abs=6e-7)


@every_case
def test_values_equal_an_independent_formula(case):
    rows = random_rows(17)
    output = parse(case.expression)(make_batch(rows))
    by_role = list(zip(*(case.values(row) for row in rows), strict=True))
    expected = torch.tensor([value for role in by_role for value in role], dtype=torch.float64)
    torch.testing.assert_close(output.per_example, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-12, atol=1e-12)


@every_case
def test_value_where_policy_equals_reference(case):
    if case.at_equality is None:
        pytest.skip("depends on the log-probabilities or on the baseline")
    rows = [replace(row, rw=row.pw, rl=row.pl, z0=0.0) for row in random_rows(5)]
    values = parse(case.expression)(make_batch(rows)).per_example
    torch.testing.assert_close(values, torch.full_like(values, case.at_equality))


@every_loss
def test_gradient_in_float64(expression):
    batch = make_batch(random_rows(4))
    loss = parse(expression)

    def value(pw, pl):
        return loss(with_logps(batch, pw, pl)).loss

    inputs = tuple(x.clone().requires_grad_() for x in leaves(batch))
    assert torch.autograd.gradcheck(value, inputs)


def with_logps(batch: PreferenceBatch, pw: torch.Tensor, pl: torch.Tensor) -> PreferenceBatch:
    return replace(batch, chosen=replace(batch.chosen, logps=pw), rejected=replace(batch.rejected, logps=pl))


@every_loss
def test_order_of_examples_does_not_matter(expression):
    rows = random_rows(6)
    loss = parse(expression)
    torch.testing.assert_close(loss(make_batch(rows)).loss, loss(make_batch(rows[::-1])).loss, rtol=1e-12, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_extreme_ratios_stay_finite(expression, dtype, size):
    row = Row(pw=-2e4 + size, pl=-2e4 - size, rw=-2e4, rl=-2e4, nw=7, nl=900, z0=abs(size))
    batch = make_batch([row], dtype, requires_grad=True)
    output = parse(expression)(batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(output.loss)
    assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves(batch))


@every_loss
def test_equal_completions_give_a_finite_gradient(expression):
    batch = make_batch([Row(-5, -5, -5, -5, 3, 3)], requires_grad=True)
    parse(expression)(batch).loss.backward()
    assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves(batch))


@every_loss
def test_weight_scales_every_example(expression):
    rows = random_rows(3)
    weights = [0.0, 0.5, 2.0]
    loss = parse(expression)
    plain, weighted = loss(make_batch(rows)), loss(make_batch(rows, weight=weights))
    repeats = plain.per_example.numel() // len(rows)
    scale = torch.tensor(weights * repeats, dtype=torch.float64)
    torch.testing.assert_close(weighted.per_example, plain.per_example)
    torch.testing.assert_close(weighted.loss, (plain.per_example * scale).mean())


@every_loss
def test_weight_zero_removes_an_example_from_the_gradient(expression):
    rows = [replace(row, rw=row.pw - 0.5, rl=row.pl) for row in random_rows(3)]  # within reach of hinge's margin
    batch = make_batch(rows, weight=[1.0, 0.0, 1.0], requires_grad=True)
    parse(expression)(batch).loss.backward()
    gradients = [leaf.grad for leaf in leaves(batch) if leaf.grad is not None]
    assert gradients
    assert all(gradient[1] == 0 for gradient in gradients)
    assert all(gradient[0] != 0 for gradient in gradients)


@every_loss
def test_text_round_trip(expression):
    loss = parse(expression)
    again = parse(str(loss))
    assert str(again) == str(loss)
    batch = make_batch(random_rows(4))
    torch.testing.assert_close(again(batch).loss, loss(batch).loss, rtol=0, atol=0)


@every_loss
def test_declared_needs_are_enough_and_necessary(expression):
    loss = parse(expression)
    full = make_batch(random_rows(3))
    bare = PreferenceBatch(
        chosen=Scores(full.chosen.logps, full.chosen.lengths),
        rejected=Scores(full.rejected.logps, full.rejected.lengths),
    )
    if loss.needs == Need.NONE:
        torch.testing.assert_close(loss(bare).loss, loss(full).loss)
    else:
        with pytest.raises(ValueError, match=r"ref_logps|other examples' prompts"):
            loss(bare)


@every_loss
def test_missing_role_is_named(expression):
    loss: Loss = parse(expression)
    full = make_batch(random_rows(2))
    missing = loss.roles[-1]
    with pytest.raises(ValueError, match=f"no {missing} ones"):
        loss(replace(full, **{missing: None}))


@every_loss
def test_documented_for_the_command_line(expression):
    for _, _, loss in parse(expression).terms():
        assert loss.formula
        assert "Needs" in (type(loss).__doc__ or "")
        assert "Args:" in (type(loss).__doc__ or "")
