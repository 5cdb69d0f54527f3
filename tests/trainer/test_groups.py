"""Training on groups: as pairs where they are pairs, in parts, accumulated, with a cache; and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from prefopt.losses import parse
from prefopt.safety.errors import UsageError
from prefopt.scoring import PreferenceCollator, Scorer
from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import make_groups, make_pairs, make_trainer
from tests.trainer.test_token_budget import assert_same

LOSSES = ["plackett_luce", "length_normalized(infonca(beta=1.0))", "gvpo(beta=0.5) + 0.1*plackett_luce"]


def run(folder, name="run", **options):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 8, "seed": 1, "learning_rate": 1e-2}
    trainer = make_trainer(folder, output_dir=str(folder / name), **{**defaults, **options})
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    log = [{k: v for k, v in one.items() if "loss" in one} for one in trainer.state.log_history if "loss" in one]
    return (log, weights, None), trainer


def test_groups_of_two_train_as_pairs_do(tmp_path):
    pairs = make_pairs(24, weight=[0.5 + i % 3 for i in range(24)])
    sides = zip(pairs["rejected"], pairs["chosen"], strict=True)
    rows = [
        {"prompt": prompt, "completions": list(both), "scores": [-1.0, 0.5], "weight": weight}
        for prompt, weight, both in zip(pairs["prompt"], pairs["weight"], sides, strict=True)
    ]
    (mine, weights, _), _ = run(tmp_path, "groups", loss="plackett_luce", train_dataset=Dataset.from_list(rows))
    (theirs, expected, _), _ = run(tmp_path, "pairs", loss="dpo", train_dataset=pairs)
    for one, other in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "num_tokens", "entropy"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
        assert one["rewards/best"] == pytest.approx(other["rewards/chosen"], rel=1e-4, abs=1e-6)
    assert float((weights - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_the_same_run_in_parts_and_accumulated(tmp_path, loss, layout):
    data = make_groups(24, weight=[0.5 + i % 3 for i in range(24)])
    shared = {"loss": loss, "train_dataset": data, "layout": layout}
    whole, _ = run(tmp_path, "whole", **shared)
    parts, _ = run(tmp_path, "parts", token_budget=200, **shared)
    assert_same(parts, whole)
    accumulated, _ = run(tmp_path, "four", per_device_train_batch_size=2, gradient_accumulation_steps=4, **shared)
    assert_same(accumulated, whole)


def test_trees_and_padded_rows_agree_and_compute_the_prompt_once(tmp_path):
    data = make_groups(8, largest=4)
    runs = {name: run(tmp_path, name, loss="gvpo", train_dataset=data, layout=name) for name in ("tree", "padded")}
    assert_same(runs["tree"][0], runs["padded"][0])
    trainer = runs["tree"][1]
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, words: seen.append(words["input_ids"].numel()), with_kwargs=True
    )
    rows = list(trainer.train_dataset)
    trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    once = sum(len(row["prompt_ids"]) + sum(map(len, row["completions_ids"])) for row in rows)
    assert seen[0] <= once  # beginnings that completions share are computed once, too


def test_the_reference_cache_serves_groups(tmp_path):
    data = make_groups(16)
    shared = {"loss": "infonca", "train_dataset": data, "reference_cache": str(tmp_path / "cache")}
    first, _ = run(tmp_path, "first", **shared, save_strategy="no")
    again, trainer = run(tmp_path, "again", **shared, save_strategy="no")
    assert_same(again, first)
    assert trainer._scorer.cache.hits > 0
    assert trainer._scorer.cache.misses == 0


def test_an_evaluation_is_the_mean_over_all_groups(tmp_path):
    data = make_groups(7)
    _, trainer = run(tmp_path, loss="gvpo", train_dataset=data, per_device_eval_batch_size=3,
                     trainer_options={"eval_dataset": data})  # fmt: skip
    logs = trainer.evaluate()
    model = trainer.model.eval()
    loss = parse("gvpo")
    scorer = Scorer(loss, model, reference=trainer.ref_model)
    with torch.no_grad():
        rows = list(trainer.eval_dataset)
        whole = loss(scorer(PreferenceCollator.for_loss(loss, make_tokenizer().pad_token_id)(rows)))
    assert logs["eval_loss"] == pytest.approx(float(whole.loss), rel=1e-4)
    assert logs["eval_rewards/margins"] == pytest.approx(float(whole.metrics["rewards/margins"].mean()), rel=1e-3)


def test_lists_in_order_train_a_loss_that_reads_their_order(tmp_path):
    data = make_groups(8).remove_columns("scores")
    (log, *_), _ = run(tmp_path, loss="plackett_luce", train_dataset=data)
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    batch = PreferenceCollator(0)([{"prompt_ids": [1], "completions_ids": [[2], [3], [4]]}])
    assert batch["candidate_scores"].tolist() == [2.0, 1.0, 0.0]


def test_tokenized_groups_need_no_text(tmp_path):
    rows = [{"prompt_ids": [5, 6, 7], "completions_ids": [[8, 9], [10], [11, 3]], "scores": [1.0, 0.0, 2.0]}] * 8
    (log, *_), _ = run(tmp_path, loss="gvpo", train_dataset=Dataset.from_list(rows))
    assert math.isfinite(log[0]["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo", "train_dataset": make_groups(8)}, r"compares no groups.*prefopt pair"),
        ({"loss": "kto", "train_dataset": make_groups(8)}, r"compares no groups"),
        ({"loss": "gvpo", "train_dataset": make_pairs(8)}, r"completions of a group.*--lists"),
        ({"loss": "gvpo", "train_dataset": make_groups(8).remove_columns("scores")}, r"reads scores.*plackett_luce"),
        (
            {"loss": "gvpo", "train_dataset": make_groups(8), "precompute_ref_log_probs": True},
            r"reference_cache='auto'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_training(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        make_trainer(tmp_path, **options)


def test_a_token_beyond_the_vocabulary_is_named_in_groups(tmp_path):
    rows = [{"prompt_ids": [5], "completions_ids": [[8, 9], [10**6]], "scores": [1.0, 0.0]}]
    with pytest.raises(ValueError, match=r"1000000|wrong type: ids"):
        make_trainer(tmp_path, loss="gvpo", train_dataset=Dataset.from_list(rows))


def test_rows_of_a_loop_of_ones_own_without_scores_are_refused():
    collate = PreferenceCollator.for_loss(parse("gvpo"), 0)
    with pytest.raises(UsageError, match="plackett_luce"):
        collate([{"prompt_ids": [1], "completions_ids": [[2], [3]]}])
    with pytest.raises(UsageError, match="each of 2 completions"):
        collate([{"prompt_ids": [1], "completions_ids": [[2], [3]], "scores": [1.0]}])
    model, loss = make_model(), parse("dpo")
    batch = PreferenceCollator(0)([{"prompt_ids": [1], "completions_ids": [[2]]}])
    with pytest.raises(UsageError, match="rows are groups"):
        Scorer(loss, model, reference=model)(batch)
