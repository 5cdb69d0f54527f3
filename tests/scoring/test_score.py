"""Which rows are scored under which model, and that leaving the others out changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefopt.losses import Loss, Need, PreferenceBatch, parse
from prefopt.losses.scores import Role
from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.layout import Layout
from prefopt.scoring.rows import RowBatch
from prefopt.scoring.sampling import prompts_of, with_samples
from prefopt.scoring.scorer import Scorer
from tests.tiny import make_model

EXAMPLES = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2]},
    {"prompt_ids": [5], "chosen_ids": [2], "rejected_ids": [30, 31, 32, 33, 34, 2]},
    {"prompt_ids": [12, 13], "chosen_ids": [40, 41, 2], "rejected_ids": [42, 2]},
]


class Counted(Layout):
    """Tiny models in the padded layout, and the roles of the rows that each was asked about."""

    def __init__(self) -> None:
        super().__init__("padded")
        self.policy, self.reference, self.previous = (make_model(seed=seed).eval() for seed in range(3))
        self.seen: dict[str, list[list[int]]] = {"policy": [], "reference": [], "previous": []}

    def score(self, model: Any, rows: RowBatch, **options: Any):
        name = next(name for name in self.seen if getattr(self, name) is model)
        self.seen[name].append(rows.roles.tolist())
        return super().score(model, rows, **options)

    def batch(self, rows: RowBatch, loss: Loss, every_role: bool = False, previous: bool = False) -> PreferenceBatch:
        scorer = Scorer(loss, self.policy, self.reference, self.previous if previous else None, self)
        return scorer.score(self.policy, rows, every_role=every_role).batch


def collate(mismatched: bool = False, examples: Any = EXAMPLES) -> RowBatch:
    return RowBatch.of(PreferenceCollator(pad_token_id=0, mismatched=mismatched)(examples))


@pytest.mark.parametrize(
    ("expression", "policy", "reference"),
    [
        ("dpo", [{0, 1}], [{0, 1}]),
        ("simpo", [{0, 1}], []),
        ("sft", [{0}], []),
        ("npo", [{1}], [{1}]),
        ("npo + sft", [{0, 1}], [{1}]),
        ("ga", [{1}], []),
        ("kl_retain", [{0}], [{0}]),
        ("kto", [{0, 1}, {2}], [{0, 1}, {2}]),
    ],
)
def test_only_what_is_needed_is_scored(expression, policy, reference):
    counted = Counted()
    counted.batch(collate(mismatched=expression == "kto"), parse(expression))
    assert [set(roles) for roles in counted.seen["policy"]] == policy
    assert [set(roles) for roles in counted.seen["reference"]] == reference


@pytest.mark.parametrize(
    "expression", ["sft", "npo + sft", "npo + kl_retain", "kto", "tdpo", "wpo(dpo)", "cringe(k=3)", "undial", "ld_dpo"]
)
def test_leaving_rows_out_changes_nothing(expression):
    loss = parse(expression)
    inputs = collate(mismatched=expression == "kto")
    results = []
    for every_role in (True, False):
        counted = Counted()
        batch = counted.batch(inputs, loss, every_role)
        # Draws and running statistics start anew.
        output = parse(expression)(batch)
        output.loss.backward()
        gradient = counted.policy.get_input_embeddings().weight.grad
        results.append((output.loss.detach(), gradient))
    for with_all, without in zip(*results, strict=True):
        torch.testing.assert_close(with_all, without, rtol=2e-5, atol=1e-6)


def test_the_estimate_over_mismatched_pairs_carries_no_gradient():
    batch = Counted().batch(collate(mismatched=True), parse("kto"))
    assert batch.mismatched.logps.shape == (6,)
    assert not batch.mismatched.logps.requires_grad
    assert batch.chosen.logps.requires_grad


def test_the_previous_iterate_is_the_data_then_the_model_then_the_reference():
    loss, counted = parse("inpo"), Counted()
    first = counted.batch(collate(), loss)
    torch.testing.assert_close(first.chosen.prev_logps, first.chosen.ref_logps)
    later = counted.batch(collate(), loss, previous=True)
    assert not torch.allclose(later.chosen.prev_logps, later.chosen.ref_logps)
    given = [{**e, "prev_chosen_logps": -1.0 - i, "prev_rejected_logps": -9.0} for i, e in enumerate(EXAMPLES)]
    told = counted.batch(collate(examples=given), loss, previous=True)
    assert told.chosen.prev_logps.tolist() == [-1.0, -2.0, -3.0]
    assert told.rejected.prev_logps.tolist() == [-9.0] * 3


def test_the_reference_stands_for_the_previous_iterate_in_roles_that_do_not_compare_with_it():
    class Previous(Loss):
        """Compares rejected completions with the previous iterate alone."""

        needs = Need.PREVIOUS
        roles = ("rejected",)

        def per_example(self, batch):
            return batch.rejected.logps - batch.rejected.prev_logps

    alone = Counted().batch(collate(), Previous())
    summed = Counted().batch(collate(), Previous() + parse("apo_zero"))
    beside = Counted().batch(collate(), Previous() + KeepChosen())
    for batch in (summed, beside):
        torch.testing.assert_close(batch.rejected.prev_logps, alone.rejected.prev_logps, rtol=1e-5, atol=1e-5)


class KeepChosen(Loss):
    """Compares chosen completions with the reference."""

    needs = Need.REFERENCE
    roles = ("chosen",)

    def per_example(self, batch):
        return -batch.chosen.ratios


def test_prompts_are_found_in_any_layout_of_rows():
    assert [prompt.tolist() for prompt in prompts_of(collate(mismatched=True))] == [e["prompt_ids"] for e in EXAMPLES]


def test_samples_are_drawn_from_the_policy_and_end_at_its_end_token():
    model = make_model(seed=0)
    model.train()
    torch.manual_seed(0)
    inputs = with_samples(collate(), model, max_new_tokens=5, pad_token_id=0, eos_token_id=2)
    assert model.training
    rows = inputs.roles == Role.SAMPLED
    assert inputs.examples[rows].tolist() == [0, 1, 2]
    lengths = inputs.completion[rows].sum(-1)
    assert bool(((lengths >= 1) & (lengths <= 5)).all())
    batch = Counted().batch(inputs, parse("hypo"))
    assert batch.sampled.lengths.tolist() == lengths.tolist()
    assert batch.sampled.ref_logps is not None


def test_samples_follow_the_whole_distribution():
    """The first token's frequencies are the model's own: no temperature, no cut-off, whatever the model's defaults."""
    model = make_model(seed=0).eval()
    model.generation_config.temperature, model.generation_config.top_k = 0.1, 2
    example = {"prompt_ids": [5, 6], "chosen_ids": [9, 2], "rejected_ids": [11, 2]}
    many = collate(examples=[example] * 2000)
    torch.manual_seed(0)
    inputs = with_samples(many, model, max_new_tokens=1, pad_token_id=0, eos_token_id=2)
    drawn = inputs.ids[inputs.roles == Role.SAMPLED][:, 2]
    with torch.no_grad():
        probs = torch.softmax(model(torch.tensor([[5, 6]])).logits[0, -1], -1)
    half = probs.argsort(descending=True)[: len(probs) // 2]
    share = torch.isin(drawn, half).double().mean()
    assert float(share) == pytest.approx(float(probs[half].sum()), abs=0.04)
