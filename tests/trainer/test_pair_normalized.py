"""`pair_normalized` through the trainer: its gradient, however a batch is cut up, and what a step does."""

from __future__ import annotations

import pytest
import torch

from prefopt import PreferenceTrainer
from prefopt.analysis import EntanglementCallback, pushes
from prefopt.losses import parse
from prefopt.scoring import Layout, PreferenceCollator, RowBatch, Scorer
from prefopt.trainer.term_gradients import check_engine
from tests.trainer.runs import make_pairs, make_trainer, train
from tests.trainer.test_conflict_free import assert_close, stepped_with

INNER = "dpo(beta=0.5) + 0.3*sft"
LOSS = f"pair_normalized({INNER})"


def by_hand(folder) -> list[torch.Tensor]:
    """From a gradient of each answer's log-probability."""
    trainer = make_trainer(folder, loss=INNER, train_dataset=make_pairs(8))
    loss, trained = parse(INNER), [p for p in trainer.model.parameters() if p.requires_grad]
    rows = RowBatch.of(PreferenceCollator.for_loss(loss, 0)(list(trainer.train_dataset)))
    batch = Scorer(loss, trainer.model.eval(), trainer.ref_model, layout=Layout("padded"))(rows, every_role=True)
    total = [torch.zeros_like(parameter) for parameter in trained]
    for scores, push, sign in zip((batch.chosen, batch.rejected), pushes(loss, batch), (-1, 1), strict=True):
        for logp, d in zip(scores.logps, push.tolist(), strict=True):
            gradient = torch.autograd.grad(logp, trained, retain_graph=True)
            norm = torch.cat([part.flatten() for part in gradient]).norm()
            for mine, part in zip(total, gradient, strict=True):
                mine += sign * d / 8 * part / norm
    return total


def test_a_step_is_along_the_normalised_gradients_of_single_answers(tmp_path):
    assert_close(stepped_with(tmp_path, LOSS), by_hand(tmp_path))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"token_budget": 1000, "layout": "padded"},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_however_a_batch_is_cut_up(tmp_path, kind, options):
    assert_close(stepped_with(tmp_path, LOSS, kind=kind, **options), stepped_with(tmp_path, LOSS, kind=kind))


def test_the_loss_that_is_logged_is_the_inner_one(tmp_path):
    own, plain = (train(tmp_path, loss=loss, max_steps=1) for loss in (LOSS, INNER))
    for name in ("loss", "dpo/loss", "sft/loss", "rewards/margins"):
        assert own[0][name] == pytest.approx(plain[0][name], rel=1e-6), name
    assert own[0]["grad_norm"] < 1 < plain[0]["grad_norm"]


def test_steps_that_lowered_both_answers_move_each_pair_as_wanted(tmp_path):
    shares = {}
    # The rejected answers repeat what the chosen ones say: their gradients are longer, and point the same way.
    said = [[{"role": "assistant", "content": "the bridge carries load over" * times}] for times in (1, 4)]
    pairs = make_pairs(16).map(lambda _: dict(zip(("chosen", "rejected"), said, strict=True)))
    for loss in ("dpo(beta=0.5)", "pair_normalized(dpo(beta=0.5))"):
        trainer = make_trainer(tmp_path, loss=loss, train_dataset=pairs, max_steps=2, learning_rate=1e-4)
        trainer.add_callback(watch := EntanglementCallback(trainer, every=1, probes=16))
        trainer.train()
        shares[loss] = [measured.share("as wanted") for _, measured in watch.measured]
    entangled, own = shares.values()
    assert max(entangled) < 0.5
    assert min(own) == 1.0


class Regularised(PreferenceTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss + inputs.get("share_of_batch", 1.0) * 0.01 * sum(p.square().sum() for p in model.parameters())


def test_what_an_override_adds_keeps_its_gradient(tmp_path):
    own, both = stepped_with(tmp_path, LOSS), stepped_with(tmp_path, LOSS, trainer=Regularised)
    weights = make_trainer(tmp_path, loss=LOSS).model.parameters()
    assert_close(both, [mine + 0.02 * weight.detach() for mine, weight in zip(own, weights, strict=True)])


def test_engines_without_whole_gradients_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, loss=LOSS)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="pair_normalized does not work with FSDP"):
        check_engine(trainer, parse(LOSS))
