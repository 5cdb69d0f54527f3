"""Which rows are scored under which model, and that leaving the others out changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefopt.losses import Loss, Need, parse
from prefopt.scoring import score_rows
from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.sampling import prompts_of, with_samples
from prefopt.scoring.score import Models, score_batch
from tests.tiny import make_model

EXAMPLES = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2]},
    {"prompt_ids": [5], "chosen_ids": [2], "rejected_ids": [30, 31, 32, 33, 34, 2]},
    {"prompt_ids": [12, 13], "chosen_ids": [40, 41, 2], "rejected_ids": [42, 2]},
]


class Counted:
    """Two tiny models, and the roles of the rows that each was asked about."""

    def __init__(self) -> None:
        self.policy_model, self.reference_model = make_model(seed=0).eval(), make_model(seed=1).eval()
        self.previous_model = make_model(seed=2).eval()
        self.seen: dict[str, list[list[int]]] = {"policy": [], "reference": [], "previous": []}

    def _run(self, name: str, inputs: Any, **options: Any):
        self.seen[name].append(inputs["roles"].tolist())
        model = getattr(self, f"{name}_model")
        kept = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        return score_rows(model, kept, inputs["completion_mask"], **options)[0]

    def models(self, previous: bool = False) -> Models:
        def frozen(name: str, inputs: Any, keep_logits: bool = False):
            with torch.no_grad():
                return self._run(name, inputs, keep_logits=keep_logits)

        return Models(
            policy=lambda inputs, extras, reference: self._run("policy", inputs, extras=extras, reference=reference),
            reference=lambda inputs, keep: frozen("reference", inputs, keep),
            previous=(lambda inputs: frozen("previous", inputs)) if previous else None,
        )


def collate(mismatched: bool = False) -> dict[str, Any]:
    return PreferenceCollator(pad_token_id=0, mismatched=mismatched)(EXAMPLES)


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
    score_batch(collate(mismatched=expression == "kto"), parse(expression), counted.models(), every_role=False)
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
        batch, _, _ = score_batch(inputs, loss, counted.models(), every_role=every_role)
        # Draws and running statistics start anew.
        output = parse(expression)(batch)
        output.loss.backward()
        gradient = counted.policy_model.get_input_embeddings().weight.grad
        results.append((output.loss.detach(), gradient))
    for with_all, without in zip(*results, strict=True):
        torch.testing.assert_close(with_all, without, rtol=2e-5, atol=1e-6)


def test_the_estimate_over_mismatched_pairs_carries_no_gradient():
    batch, _, _ = score_batch(collate(mismatched=True), parse("kto"), Counted().models(), every_role=False)
    assert batch.mismatched.logps.shape == (6,)
    assert not batch.mismatched.logps.requires_grad
    assert batch.chosen.logps.requires_grad


def test_the_previous_iterate_is_the_data_then_the_model_then_the_reference():
    loss, counted = parse("inpo"), Counted()
    first, _, _ = score_batch(collate(), loss, counted.models(), every_role=False)
    torch.testing.assert_close(first.chosen.prev_logps, first.chosen.ref_logps)
    later, _, _ = score_batch(collate(), loss, counted.models(previous=True), every_role=False)
    assert not torch.allclose(later.chosen.prev_logps, later.chosen.ref_logps)
    given = [{**e, "prev_chosen_logps": -1.0 - i, "prev_rejected_logps": -9.0} for i, e in enumerate(EXAMPLES)]
    inputs = PreferenceCollator(pad_token_id=0)(given)
    told, _, _ = score_batch(inputs, loss, counted.models(previous=True), every_role=False)
    assert told.chosen.prev_logps.tolist() == [-1.0, -2.0, -3.0]
    assert told.rejected.prev_logps.tolist() == [-9.0] * 3


def test_the_reference_stands_for_the_previous_iterate_in_roles_that_do_not_compare_with_it():
    class Previous(Loss):
        """Compares rejected completions with the previous iterate alone."""

        needs = Need.PREVIOUS
        roles = ("rejected",)

        def per_example(self, batch):
            return batch.rejected.logps - batch.rejected.prev_logps

    alone, _, _ = score_batch(collate(), Previous(), Counted().models(), every_role=False)
    summed, _, _ = score_batch(collate(), Previous() + parse("apo_zero"), Counted().models(), every_role=False)
    beside, _, _ = score_batch(collate(), Previous() + KeepChosen(), Counted().models(), every_role=False)
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
    rows = inputs["roles"] == 3
    assert inputs["examples"][rows].tolist() == [0, 1, 2]
    lengths = inputs["completion_mask"][rows].sum(-1)
    assert bool(((lengths >= 1) & (lengths <= 5)).all())
    batch, _, _ = score_batch(inputs, parse("hypo"), Counted().models(), every_role=False)
    assert batch.sampled.lengths.tolist() == lengths.tolist()
    assert batch.sampled.ref_logps is not None


def test_samples_follow_the_whole_distribution():
    """The first token's frequencies are the model's own: no temperature, no cut-off, whatever the model's defaults."""
    model = make_model(seed=0).eval()
    model.generation_config.temperature, model.generation_config.top_k = 0.1, 2
    example = {"prompt_ids": [5, 6], "chosen_ids": [9, 2], "rejected_ids": [11, 2]}
    many = PreferenceCollator(pad_token_id=0)([example] * 2000)
    torch.manual_seed(0)
    inputs = with_samples(many, model, max_new_tokens=1, pad_token_id=0, eos_token_id=2)
    drawn = inputs["input_ids"][inputs["roles"] == 3][:, 2]
    with torch.no_grad():
        probs = torch.softmax(model(torch.tensor([[5, 6]])).logits[0, -1], -1)
    half = probs.argsort(descending=True)[: len(probs) // 2]
    share = torch.isin(drawn, half).double().mean()
    assert float(share) == pytest.approx(float(probs[half].sum()), abs=0.04)
