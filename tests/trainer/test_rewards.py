"""Which objectives log rewards, and that a run without them says why."""

from __future__ import annotations

import torch

from prefopt.losses import DPO, SFT, Need, PairLoss, ReferencePairLoss, available, parse
from prefopt.trainer.metrics import rewards_not_logged
from tests.trainer.runs import make_pairs, make_trainer


class Plain(PairLoss):
    needs = Need.REFERENCE

    def per_example(self, batch):
        return torch.exp(batch.rejected.ratios - batch.chosen.ratios)


class Rewarded(ReferencePairLoss):
    def per_example(self, batch):
        return torch.exp(-self.scaled_margin(batch))


def test_a_loss_of_ones_own_without_rewards_is_told_how_to_have_them():
    line = rewards_not_logged(Plain() + SFT())
    assert line is not None
    assert "Plain has no method reward()" in line
    assert "ReferencePairLoss" in line


def test_nothing_is_said_where_rewards_are_logged_or_cannot_be():
    for loss in (Rewarded(), Plain() + DPO(), parse("sft"), parse("ga"), parse("dpo + sft"), parse("wpo(dpo)")):
        assert rewards_not_logged(loss) is None, loss


def test_having_rewards_is_known_without_scoring():
    without = {name for name, cls in available().items() if cls.needs is not None and not _made(cls).has_reward}
    assert {"sft", "ga", "kl_retain", "cringe"} <= without
    assert not without & {"dpo", "simpo", "kto", "orpo", "npo", "wpo", "length_normalized", "conflict_free"}


def _made(cls):
    try:
        return cls()
    except TypeError:
        return cls(parse("dpo + sft"))


def test_a_run_says_so_once_at_its_start(tmp_path, caplog):
    make_trainer(tmp_path, train_dataset=make_pairs(8), trainer_options={"loss": Plain()})
    assert [record.levelname for record in caplog.records if "no method reward" in record.message] == ["WARNING"]
