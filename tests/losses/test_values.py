"""What a loss of one's own returns is a value an example, and what it reads it asks for; anything else is named."""

from __future__ import annotations

import pytest
import torch

from prefopt.losses import (
    WPO,
    LengthNormalized,
    Loss,
    Need,
    NoiseRobust,
    PairLoss,
    PreferenceBatch,
    Reweighted,
    Scores,
)
from prefopt.trainer.config import resolve_objective


def batch(n=3, m=3, paired=True, weight=None):
    def scores(count):
        columns = {} if weight is None else {"weight": torch.full((count,), weight)}
        logps = torch.randn(count, requires_grad=True)
        return Scores(logps, torch.full((count,), 4), ref_logps=torch.zeros(count), columns=columns)

    return PreferenceBatch(chosen=scores(n), rejected=scores(m), paired=paired)


def loss_of(values, base=PairLoss, **attributes):
    made = type(
        "Mine", (base,), {"per_example": lambda self, batch: values(batch.chosen, batch.rejected), **attributes}
    )
    return made()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (lambda c, r: (c.logps - r.logps).mean(), r"a tensor of shape \(\)"),
        (lambda c, r: (c.logps - r.logps)[:, None], r"a tensor of shape \(3, 1\)\. Remove the last .* squeeze\(-1\)"),
        (lambda c, r: torch.stack([c.logps, r.logps], -1), r"a tensor of shape \(3, 2\)\. Reduce the further"),
        (lambda c, r: (c.logps - r.logps).mean(0, keepdim=True), r"a tensor of shape \(1,\)\. Leave the mean"),
        (lambda c, r: torch.cat([c.logps, r.logps]), r"a tensor of shape \(6,\)"),
        (lambda c, r: float(c.logps.sum()), "float"),
        (lambda c, r: (c.logps, {}), "tuple"),
        (lambda c, r: None, "NoneType"),
    ],
    ids=["mean", "column", "two columns", "mean of one", "both roles", "number", "tuple", "nothing"],
)
@pytest.mark.parametrize("weight", [None, 2.0])
def test_anything_but_a_value_a_pair_is_refused(values, found, weight):
    """A mean would count the weights of all examples for each, a column every value once a weight."""
    with pytest.raises(ValueError, match=rf"Mine\.per_example .* shape \(3,\), one value a pair.* returned {found}"):
        loss_of(values)(batch(weight=weight))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda c, r: (r.logps - c.logps).detach(), "returns values without a gradient"),
        (lambda c, r: c.logps > r.logps, r"must return floating-point numbers, and returned torch\.bool"),
        (lambda c, r: torch.arange(3), r".* returned torch\.int64"),
    ],
)
def test_values_that_train_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=rf"Mine\.per_example {message}"):
        loss_of(values)(batch())


def test_values_without_a_gradient_are_what_is_expected_where_the_scores_have_none():
    detached = loss_of(lambda c, r: (r.logps - c.logps).detach())
    with torch.no_grad():
        assert detached(batch()).loss.isfinite()
    scores = Scores(torch.zeros(2), torch.ones(2))
    assert detached(PreferenceBatch(chosen=scores, rejected=scores)).loss == 0


@pytest.mark.parametrize("around", [WPO, NoiseRobust, Reweighted, LengthNormalized])
def test_a_loss_inside_another_one_is_named_itself(around):
    mine = loss_of(lambda c, r: (c.logps - r.logps)[:, None], needs=Need.REFERENCE)
    extra = {"aligned": False} if around is WPO else {}
    with pytest.raises(ValueError, match=r"^Mine\.per_example must return a tensor of shape \(3,\)"):
        around(mine, **extra)(batch())


def test_the_checks_never_wait_for_the_device():
    """On the meta device nothing can be read."""
    meta = Scores(torch.zeros(3, device="meta", requires_grad=True), torch.ones(3, device="meta"))
    output = loss_of(lambda c, r: r.logps - c.logps)(PreferenceBatch(chosen=meta, rejected=meta))
    assert output.loss.device.type == "meta"


def test_single_completions_have_a_value_each():
    mine = loss_of(lambda c, r: c.logps[:2] - r.logps, base=Loss)
    with pytest.raises(ValueError, match=r"shape \(5,\), one value a completion \(3 chosen, 2 rejected\)"):
        mine(batch(3, 2, paired=False))
    assert loss_of(lambda c, r: torch.cat([c.logps, r.logps]), base=Loss)(batch(3, 2, paired=False)).loss.isfinite()


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (lambda c, r: c.logps - c.prev_logps, "reads prev_logps .* add Need.PREVIOUS to `needs`"),
        (lambda c, r: -c.token_logps.sum(-1), "reads token_logps .* add Need.TOKENS"),
        (lambda c, r: c.top_logps[..., 0].sum(-1), "reads top_logps .* add Need.TOP_K"),
        (lambda c, r: c.columns["margin"] * c.logps, r"reads the column 'margin' .*columns = \('margin',\)"),
    ],
)
def test_what_is_read_without_asking_is_named(values, advice):
    with pytest.raises(ValueError, match=rf"Mine\.per_example {advice}"):
        loss_of(values, needs=Need.REFERENCE)(batch())


def test_other_faults_of_a_loss_stay_its_own():
    with pytest.raises(TypeError, match="unsupported operand"):
        loss_of(lambda c, r: c.logps - "x")(batch())
    with pytest.raises(KeyError, match="mine"):
        loss_of(lambda c, r: {}["mine"])(batch())


def test_a_loss_that_is_not_made_yet_is_refused_by_name():
    class Unfinished(PairLoss):
        def __init__(self, beta=0.1):
            self.beta = beta

    with pytest.raises(TypeError, match=r"Unfinished\.__init__ must call super\(\)\.__init__\(\)"):
        resolve_objective(Unfinished(), None)
    with pytest.raises(TypeError, match=r"Unfinished.*loss=Mine\(\.\.\.\)"):
        resolve_objective(Unfinished, None)
