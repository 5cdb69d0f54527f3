"""What every registered loss must satisfy. A loss without a row in `cases.CASES` fails here."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch

from prefopt.losses import Loss, Need, PreferenceBatch, Scores, available, parse, presets
from prefopt.losses.base import ROLES
from prefopt.losses.needs import QUANTITIES
from tests.losses.cases import CASES, REFERENCE_VECTOR, Row, make_batch, random_rows, some_groups

EXPRESSIONS = [case.expression for case in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=EXPRESSIONS)
every_loss = pytest.mark.parametrize("expression", EXPRESSIONS)
every_preset = pytest.mark.parametrize("name", sorted(presets()))


def leaves(batch: PreferenceBatch) -> dict[str, torch.Tensor]:
    """Every tensor of the batch that asks for a gradient, by role and field."""
    found = {}
    for role in ROLES:
        scores = batch.role(role)
        for part in fields(Scores):
            value = getattr(scores, part.name)
            if isinstance(value, torch.Tensor) and value.requires_grad:
                found[f"{role}.{part.name}"] = value
    return found


def with_leaves(batch: PreferenceBatch, values: dict[str, torch.Tensor]) -> PreferenceBatch:
    changed: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in values.items():
        role, part = name.split(".")
        changed.setdefault(role, {})[part] = value
    return replace(batch, **{role: replace(batch.role(role), **parts) for role, parts in changed.items()})


def inner_losses(loss: Loss) -> Iterator[Loss]:
    yield from (module for module in loss.modules() if isinstance(module, Loss) and module.name)


def exact(expression: str) -> Loss:
    """The loss with its running statistics in float64, as the batches of these tests are."""
    return parse(expression).double()


def test_every_registered_loss_is_covered():
    covered = {inner.name for text in EXPRESSIONS for inner in inner_losses(parse(text))}
    assert covered == set(available())


def test_every_name_stands_for_one_thing():
    assert not set(available()) & set(presets())


@every_case
def test_value_at_the_reference_vector(case):
    if case.at_reference_vector is None:
        # Not among the published values; the formula itself is what the next test compares with.
        assert case.values is not None or case.batch_values is not None
        return
    assert sum(case.expected([REFERENCE_VECTOR])) == pytest.approx(case.at_reference_vector, abs=6e-7)
    output = parse(case.expression)(make_batch([REFERENCE_VECTOR]))
    assert float(output.per_example.sum()) == pytest.approx(case.at_reference_vector, abs=6e-7)


@every_case
@pytest.mark.parametrize("count", [1, 2, 17])
def test_values_equal_an_independent_formula(case, count):
    rows = random_rows(count, seed=count)
    output = exact(case.expression)(make_batch(rows))
    expected = torch.tensor(case.expected(rows), dtype=torch.float64)
    torch.testing.assert_close(output.per_example, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-10, atol=1e-12)


@every_case
def test_value_where_policy_equals_reference(case):
    rows = [replace(row, rw=row.pw, rl=row.pl, rs=row.ps, z0=0.0) for row in random_rows(5)]
    output = parse(case.expression)(make_batch(rows))
    expected = case.expected(rows) if case.at_equality is None else [case.at_equality] * len(output.per_example)
    torch.testing.assert_close(output.per_example, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


# ---- gradients -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def detached_values(recorded: list[torch.Tensor], replay: bool) -> Iterator[None]:
    """Record what a loss detaches, or hand the recorded values out again: the gradient of a loss with stopped
    gradients is the slope of its value with those held still."""
    plain = torch.Tensor.detach
    position = iter(recorded)

    def detach(tensor: torch.Tensor) -> torch.Tensor:
        if replay:
            return next(position)
        value = plain(tensor).clone()
        recorded.append(value)
        return value

    torch.Tensor.detach = detach  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.detach = plain  # type: ignore[method-assign]


def gradient_is_the_slope(expression: str, hold: bool) -> None:
    loss, batch = exact(expression), make_batch(random_rows(4), requires_grad=True)
    inputs = leaves(batch)
    recorded: list[torch.Tensor] = []
    if hold:
        with detached_values(recorded, replay=False):
            copy.deepcopy(loss)(batch)

    def value(*tensors: torch.Tensor) -> torch.Tensor:
        # A copy each time: running statistics move with every call.
        moved = with_leaves(batch, dict(zip(inputs, tensors, strict=True)))
        fresh = copy.deepcopy(loss)
        with detached_values(recorded, replay=True) if hold else contextlib.nullcontext():
            return fresh(moved).loss

    # Along a random direction of each leaf: one by one, the token values of all losses are five minutes of work.
    assert torch.autograd.gradcheck(value, tuple(inputs.values()), atol=1e-8, rtol=1e-5, fast_mode=True)


@every_case
def test_gradient_in_float64(case):
    gradient_is_the_slope(case.expression, hold=case.held)


@pytest.mark.parametrize("expression", [case.expression for case in CASES if case.held])
def test_gradients_are_stopped_only_where_said(expression):
    loss, batch = exact(expression), make_batch(random_rows(4), requires_grad=True)
    copy.deepcopy(loss)(batch).loss.backward()
    apart = []
    for name, leaf in leaves(batch).items():
        draw = torch.Generator().manual_seed(1)  # the same whatever other leaves there are
        direction = torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype)
        ends = [with_leaves(batch, {name: leaf.detach() + step * direction}) for step in (1e-6, -1e-6)]
        up, down = (float(copy.deepcopy(loss)(end).loss.detach()) for end in ends)
        gradient = 0.0 if leaf.grad is None else float((leaf.grad * direction).sum())
        apart.append(abs((up - down) / 2e-6 - gradient))
    # Rounding leaves a hundredth of a millionth.
    assert max(apart) > 1e-7


# ---- batches -------------------------------------------------------------------------------------------------------


@every_loss
def test_order_of_examples_does_not_matter(expression):
    rows = random_rows(6)
    forwards, backwards = (exact(expression)(make_batch(some)).loss for some in (rows, rows[::-1]))
    torch.testing.assert_close(forwards, backwards, rtol=1e-12, atol=1e-14)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_extreme_ratios_stay_finite(expression, dtype, size):
    row = Row(pw=-2e4 + size, pl=-2e4 - size, rw=-2e4, rl=-2e4, nw=7, nl=90, z0=abs(size), ps=-2e4 + size, rs=-2e4)
    batch = make_batch([row], dtype, requires_grad=True)
    output = parse(expression)(batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(output.loss)
    # The loss and its gradient in float32 are what is promised; a half-precision leaf can overflow on its own.
    if dtype == torch.float32:
        assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves(batch).values())


@every_loss
@pytest.mark.parametrize("count", [1, 2])
def test_equal_completions_give_a_finite_gradient(expression, count):
    batch = make_batch([Row(-5, -5, -5, -5, 3, 3, ps=-5, rs=-5)] * count, requires_grad=True)
    parse(expression)(batch).loss.backward()
    assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves(batch).values())


@every_loss
def test_certain_completions_give_a_finite_gradient(expression):
    batch = make_batch([Row(-1e-9, -1e-9, -1.0, -1.0, 3, 3)], torch.float32, requires_grad=True)
    output = parse(expression)(batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves(batch).values())


# ---- weights -------------------------------------------------------------------------------------------------------


@every_case
def test_weight_scales_every_example(case):
    if case.batch_values is not None or case.held:
        # Where examples act on one another the weights enter those statistics too; see the next test.
        plain = parse(case.expression)(make_batch(random_rows(3)))
        ones = parse(case.expression)(make_batch(random_rows(3), weight=[1.0] * 3))
        torch.testing.assert_close(ones.loss, plain.loss)
        return
    rows, weights = random_rows(3), [0.0, 0.5, 2.0]
    plain, weighted = (parse(case.expression)(make_batch(rows, weight=each)) for each in (None, weights))
    repeats = plain.per_example.numel() // len(rows)
    scale = torch.tensor(weights * repeats, dtype=torch.float64)
    torch.testing.assert_close(weighted.per_example, plain.per_example)
    torch.testing.assert_close(weighted.loss, (plain.per_example * scale).mean())


@every_loss
def test_weight_zero_removes_an_example(expression):
    # Within reach of every hinge and clip, so that there is a gradient to look at.
    near = [replace(row, rw=row.pw - 0.4, pl=row.pw + 1, rl=row.pw + 1, nw=row.nl) for row in random_rows(3)]
    # All of them in the part that the loss is about.
    rows = [replace(row, forget=float("on_retain" not in expression)) for row in near]
    without = parse(expression)(make_batch([rows[0], rows[2]])).loss
    batch = make_batch(rows, weight=[1.0, 0.0, 1.0], requires_grad=True)
    output = parse(expression)(batch)
    # Every loss is a mean over the batch, in which the absent example still counts.
    torch.testing.assert_close(output.loss, without * 2 / 3, rtol=1e-6, atol=1e-9)
    output.loss.backward()
    gradients = [leaf.grad for leaf in leaves(batch).values() if leaf.grad is not None]
    assert any((gradient != 0).any() for gradient in gradients)
    assert all((gradient[1] == 0).all() for gradient in gradients if len(gradient) == len(rows))
    if loss_is_grouped := parse(expression).grouped:
        (gradient,), absent = gradients, batch.candidate.groups == 1
        assert (gradient[absent] == 0).all()
    assert loss_is_grouped or all(len(gradient) == len(rows) for gradient in gradients)


def some_of(batch: PreferenceBatch, rows: list[int]) -> PreferenceBatch:
    """The batch with these examples alone."""

    def picked(scores: Scores) -> Scores:
        values = {part.name: getattr(scores, part.name) for part in fields(Scores)}
        kept = {name: value[rows] for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(scores, **kept, columns={name: column[rows] for name, column in scores.columns.items()})

    roles = ("chosen", "rejected", "mismatched", "sampled")
    some = {role: picked(scores) for role in roles if (scores := batch.role(role)) is not None}
    return replace(batch, **some, candidate=some_groups(batch.candidate, rows))


@every_loss
def test_separable_losses_are_means_of_parts_and_the_others_say_so(expression):
    loss = exact(expression)
    batch = make_batch(random_rows(6, seed=3), weight=[1.0, 0.5, 2.0, 0.0, 1.0, 1.5] if loss.separable else None)
    whole = copy.deepcopy(loss)(batch).loss
    small, large = (copy.deepcopy(loss)(some_of(batch, rows)).loss for rows in ([1, 4], [0, 2, 3, 5]))
    in_parts = float((small * 2 + large * 4).detach()) / 6
    if loss.separable:
        assert in_parts == pytest.approx(float(whole.detach()), rel=1e-9, abs=1e-12)
    elif any(part.batchwise for part in loss.modules() if isinstance(part, Loss)):
        assert in_parts != pytest.approx(float(whole.detach()), rel=1e-9, abs=1e-12)
    else:
        drawn_or_moved = "sampled" in loss.roles or Need.MISMATCHED in loss.needs
        assert drawn_or_moved or loss.state_dict()


# ---- text, needs, state --------------------------------------------------------------------------------------------


@every_loss
def test_text_round_trip(expression):
    loss = parse(expression)
    again = parse(str(loss))
    assert str(again) == str(loss)
    batch = make_batch(random_rows(4))
    torch.testing.assert_close(again(batch).loss, loss(batch).loss, rtol=0, atol=0)


def stripped(batch: PreferenceBatch, loss: Loss, without: Need = Need.NONE) -> PreferenceBatch:
    """The batch with what each role needs, and nothing else; `without` leaves one need out."""

    def keep(role: str, scores: Scores) -> Scores:
        needs = loss.needs_of(role) & ~without
        kept = {"logps": scores.logps, "lengths": scores.lengths, "columns": scores.columns}
        for need, names in ((need, quantity.fields) for need, quantity in QUANTITIES.items()):
            if need in needs:
                kept |= {name: getattr(scores, name) for name in names}
        if needs & ~(Need.REFERENCE | Need.PREVIOUS | Need.MISMATCHED):
            kept |= {"token_logps": scores.token_logps, "token_mask": scores.token_mask}
            if needs.compares:
                kept["ref_token_logps"] = scores.ref_token_logps
        if Need.STATES in needs and needs.compares:
            kept["ref_states"] = scores.ref_states
        if Need.FORWARD_KL in needs:
            kept["ref_token_entropy"] = scores.ref_token_entropy
        if role == "candidate":
            kept |= {"score": scores.score, "group_sizes": scores.group_sizes}
        return Scores(**kept)

    roles = {role: keep(role, batch.role(role)) for role in ROLES if role in loss.roles}
    mismatched = batch.mismatched if Need.MISMATCHED in loss.needs & ~without else None
    return PreferenceBatch(**roles, mismatched=mismatched)


@every_loss
def test_declared_needs_are_enough_and_necessary(expression):
    full = make_batch(random_rows(3))
    loss = parse(expression)
    exactly = parse(expression)(stripped(full, loss))
    torch.testing.assert_close(exactly.loss, parse(expression)(full).loss, rtol=0, atol=0)
    for need in loss.needs:
        with pytest.raises(ValueError, match=r"needs \w+|other examples' prompts"):
            parse(expression)(stripped(full, loss, without=need))


@every_loss
def test_missing_role_is_named(expression):
    loss: Loss = parse(expression)
    full = make_batch(random_rows(2))
    missing = loss.roles[-1]
    with pytest.raises(ValueError, match=f"no {missing} ones"):
        loss(replace(full, **{missing: None}))


@every_loss
def test_state_is_saved_and_restored(expression):
    first, second = make_batch(random_rows(5, seed=1)), make_batch(random_rows(5, seed=2))
    loss = parse(expression)
    loss(first)
    restored = parse(expression)
    restored.load_state_dict(copy.deepcopy(loss.state_dict()))
    torch.testing.assert_close(restored(second).loss, loss(second).loss, rtol=0, atol=0)


@every_loss
def test_evaluation_leaves_the_state_alone(expression):
    loss = parse(expression)
    loss(make_batch(random_rows(5, seed=1)))
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    batch = make_batch(random_rows(5, seed=2))
    values = [loss(batch).loss for _ in range(2)]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


@every_loss
def test_documented_for_the_command_line(expression):
    for loss in inner_losses(parse(expression)):
        text = type(loss).__doc__ or ""
        assert loss.formula
        assert "Needs:" in text
        assert "Args:" in text
        assert "Reference:" in text or not loss.paper
        for argument in loss.hyperparameters():
            assert f"        {argument}: " in text, argument


# ---- presets -------------------------------------------------------------------------------------------------------


@every_preset
def test_presets_expand_to_what_they_compute(name):
    preset = presets()[name]
    expanded = parse(str(preset.build()))
    batch = make_batch(random_rows(4))
    torch.testing.assert_close(parse(name)(batch).loss, expanded(batch).loss, rtol=0, atol=0)
    assert preset.paper
    assert preset.build.__doc__
