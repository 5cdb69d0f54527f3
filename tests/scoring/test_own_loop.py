"""Scoring in one's own loop: `PreferenceTrainer`'s numbers for the same rows, and errors that name what is missing."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from prefopt.data import normalise, tokenize_dataset
from prefopt.losses import PreferenceBatch, parse
from prefopt.losses.scores import EMBEDDINGS, Role
from prefopt.scoring import Layout, PreferenceCollator, RowBatch, Scorer, with_samples
from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import make_labelled, make_pairs, make_trainer

LOSSES = [
    "dpo + 0.2*sft", "simpo", "tdpo", "wpo(dpo)", "pairwise_cringe(k=2)", "f_dpo(divergence='js')", "kl_retain + npo",
    "kernel_dpo(divergence='js')", "inpo", "undial", "kto",
]  # fmt: skip
"""Between them: sums, lengths, reference, per-token values, top tokens, collisions, divergences, KL in both
directions, hidden states, a previous model, other prompts."""


def rows_of(data):
    """Token ids of a set, as a loop of one's own makes them."""
    return list(tokenize_dataset(normalise(data), make_tokenizer()))


def collated(loss, data, **options):
    return PreferenceCollator.for_loss(loss, make_tokenizer().pad_token_id, **options)(rows_of(data))


def assert_same(mine: PreferenceBatch, theirs: PreferenceBatch) -> None:
    for role in Role:
        ours, its = mine.role(role.field), theirs.role(role.field)
        assert (ours is None) == (its is None), role
        if ours is None or its is None:
            continue
        for field in fields(ours):
            one, other = getattr(ours, field.name), getattr(its, field.name)
            if isinstance(other, Tensor):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=f"{role.field} {field.name}")
            else:
                assert field.name == "columns" or one == other, field.name
        assert set(ours.columns) == set(its.columns)


@pytest.mark.parametrize("layout", ["padded", "tree"])
@pytest.mark.parametrize("text", LOSSES)
def test_the_batch_and_the_gradient_are_the_trainers(tmp_path, text, layout):
    loss, previous = parse(text), make_model(seed=3) if text == "inpo" else None
    weight = {"weight": [0.5, 1.0, 2.0, 0.0]}
    data = make_labelled(4) if text == "kto" else make_pairs(4, **weight)
    trainer = make_trainer(
        tmp_path, loss=text, layout=layout, train_dataset=data, trainer_options={"previous_model": previous}
    )
    inputs = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    theirs = trainer._score(trainer.model, RowBatch.of(inputs), all_logits=False).batch
    trainer.compute_loss(trainer.model, inputs).backward()

    model, reference = make_model().train(), make_model().eval()
    scorer = Scorer(loss, model, reference=reference, previous=previous, layout=Layout(layout))
    mine = scorer(collated(loss, data, max_length=trainer.args.max_length))
    assert_same(mine, theirs)
    assert scorer.layout.masks is None or layout == "tree"
    loss(mine).loss.backward()
    for (name, ours), its in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        assert ours.grad is not None, name
        assert float((ours.grad - its.grad).norm() / its.grad.norm().clamp(min=1e-6)) < 1e-3, name


def test_an_adapter_is_its_own_reference(tmp_path):
    torch.manual_seed(0)
    policy = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    loss, data = parse("dpo"), make_pairs(4)
    batch = Scorer(loss, policy)(collated(loss, data))
    apart = Scorer(loss, policy, reference=make_model().eval())(collated(loss, data))
    torch.testing.assert_close(batch.chosen.ref_logps, apart.chosen.ref_logps, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch.chosen.ref_logps, batch.chosen.logps)
    loss(batch).loss.backward()
    trained = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_log_probabilities_that_come_with_the_rows_take_the_place_of_the_reference():
    loss, rows = parse("dpo"), rows_of(make_pairs(3))
    rows = [{**row, "ref_chosen_logps": -1.0 - i, "ref_rejected_logps": -9.0} for i, row in enumerate(rows)]
    batch = Scorer(loss, make_model())(PreferenceCollator.for_loss(loss, 0)(rows))
    assert batch.chosen.ref_logps.tolist() == [-1.0, -2.0, -3.0]


def test_embeddings_of_the_rows_and_roles_that_a_loss_does_not_need():
    loss, rows = parse("kernel_dpo(embeddings='given')"), rows_of(make_pairs(3))
    rows = [{**row, **{name: [1.0, float(i)] for name in EMBEDDINGS}} for i, row in enumerate(rows)]
    batch = Scorer(loss, make_model(), make_model(seed=1))(PreferenceCollator.for_loss(loss, 0)(rows))
    assert batch.chosen.embedding.tolist() == [[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]
    sft = Scorer(parse("sft"), make_model())
    inputs = collated(sft.loss, make_pairs(3))
    assert sft(inputs).rejected is None
    with torch.no_grad():
        assert not sft(inputs, every_role=True).rejected.logps.requires_grad


def test_samples_are_added_by_the_loop():
    loss, model = parse("kl_online"), make_model().eval()
    scorer, rows = Scorer(loss, model, make_model(seed=1)), RowBatch.of(collated(loss, make_pairs(3)))
    with pytest.raises(ValueError, match=r"kl_online.* needs completions sampled .* prefopt\.scoring\.with_samples"):
        scorer(rows)
    batch = scorer(with_samples(rows, model, 4, 0, 2))
    assert len(batch.sampled) == 3
    assert loss(batch).loss.isfinite()


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        (lambda: Scorer(parse("dpo"), make_model())(collated(None, make_pairs(2))),
         r"dpo\(.*\) compares with a reference, and the scorer has none: pass .*reference=MODEL"),
        (lambda: PreferenceCollator.for_loss(parse("dpo"), None)(rows_of(make_pairs(2))),
         r"pad_token_id is not set: .* tokenizer\.pad_token = tokenizer\.eos_token"),
        (lambda: collated_text(), r"rows of token ids.*these have prompt, chosen, rejected\. .*tokenize_dataset"),
        (lambda: Scorer(parse("simpo"), make_model())(rows_of(make_pairs(2))),
         r"takes a batch of PreferenceCollator, got list"),
        (lambda: Scorer(parse("simpo"), make_model())(rows_of(make_pairs(2))[0]),
         r"takes a batch of PreferenceCollator, got a mapping with prompt, chosen"),
        (lambda: Scorer(parse("kto"), make_model(), make_model())(collated(None, make_labelled(4))),
         r"kto.* compares with completions under other prompts, .*for_loss"),
        (lambda: collated(parse("margin_dpo"), make_pairs(2)), "column 'margin' must hold a number"),
    ],
    ids=["reference", "padding", "text", "rows", "row", "other prompts", "column"],
)  # fmt: skip
def test_what_is_missing_is_named(scored, message):
    with pytest.raises(ValueError, match=message):
        scored()


def collated_text():
    return PreferenceCollator.for_loss(None, 0)(list(make_pairs(2)))
