"""`paired_retain`: as many rows to retain as rows to forget in every batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset

from prefopt.safety.errors import UsageError
from prefopt.trainer.paired import PairedRows
from tests.trainer.runs import make_trainer

FORGET, RETAIN = 5, 12


def rows() -> Dataset:
    texts = [f"fox {number}" for number in range(FORGET + RETAIN)]
    labels = [number >= FORGET for number in range(FORGET + RETAIN)]
    return Dataset.from_dict({"prompt": texts, "completion": [" dog"] * len(texts), "label": labels})


def epochs(sampler: PairedRows, count: int) -> list[list[int]]:
    drawn = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
    return drawn


def test_an_epoch_forgets_each_row_once_beside_one_to_retain():
    sampler = PairedRows([not label for label in rows()["label"]], seed=3)
    for order in epochs(sampler, 4):
        assert len(order) == len(sampler) == 2 * FORGET
        assert sorted(order[::2]) == list(range(FORGET))
        assert all(row >= FORGET for row in order[1::2])


def test_rows_to_retain_are_all_drawn_before_one_comes_again():
    sampler = PairedRows([not label for label in rows()["label"]], seed=3)
    drawn = list(itertools.chain.from_iterable(order[1::2] for order in epochs(sampler, 12)))
    for start in range(0, 60, RETAIN):
        assert sorted(drawn[start : start + RETAIN]) == list(range(FORGET, FORGET + RETAIN))


def test_fewer_rows_to_retain_than_to_forget_are_repeated():
    sampler = PairedRows([True] * 7 + [False] * 2, seed=0)
    (order,) = epochs(sampler, 1)
    assert sorted(order[::2]) == list(range(7))
    assert sorted(order[1::2]) == [7, 7, 7, 7, 8, 8, 8] or sorted(order[1::2]) == [7, 7, 7, 8, 8, 8, 8]


def test_the_order_depends_on_seed_and_epoch_alone():
    forget = [not label for label in rows()["label"]]
    assert epochs(PairedRows(forget, 1), 3) == epochs(PairedRows(forget, 1), 3)
    assert epochs(PairedRows(forget, 1), 1) != epochs(PairedRows(forget, 2), 1)
    late = PairedRows(forget, 1)
    late.set_epoch(2)
    assert list(late) == epochs(PairedRows(forget, 1), 3)[2]


class Watched:
    """The collator, with the roles of every batch."""

    def __init__(self, collator):
        self.collator, self.roles = collator, []

    def __call__(self, examples):
        self.roles.append([bool(example["label"]) for example in examples])
        return self.collator(examples)


def test_every_batch_of_a_run_is_half_and_half(tmp_path):
    trainer = make_trainer(
        tmp_path, loss="npo + sft", train_dataset=rows(), paired_retain=True, max_steps=-1, num_train_epochs=2
    )
    trainer.data_collator = watched = Watched(trainer.data_collator)
    trainer.train()
    assert trainer.state.global_step == 2 * 3  # 5 rows to forget in twos
    assert [sum(roles) * 2 == len(roles) for roles in watched.roles] == [True] * 6


def test_a_resumed_run_draws_the_same_rows(tmp_path):
    options = {"loss": "npo + sft", "train_dataset": rows(), "paired_retain": True, "save_strategy": "steps"}
    whole = make_trainer(tmp_path / "whole", max_steps=7, save_steps=4, **options)
    whole.train()
    parts = make_trainer(
        tmp_path / "whole", max_steps=7, save_steps=100, output_dir=str(tmp_path / "other"), **options
    )
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-4"))
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_column_forget_goes_before_labels(tmp_path):
    # "I don't know" answers to the prompts to be forgotten are desirable completions.
    data = rows()
    answers = data.map(lambda row, at: {"label": True, "forget": at < FORGET}, with_indices=True)
    trainer = make_trainer(tmp_path, loss="sft", train_dataset=answers, paired_retain=True)
    assert sorted(list(trainer._get_train_sampler())[::2]) == list(range(FORGET))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_device_train_batch_size": 3}, "must be even, got 3"),
        ({"train_dataset": rows().select(range(FORGET))}, r"no row is to retain \(label true\)"),
        ({"train_dataset": rows().select(range(FORGET, FORGET + 3))}, r"no row is to forget \(label false\)"),
        ({"train_dataset": rows().to_iterable_dataset()}, "not a stream"),
    ],
)
def test_what_cannot_be_paired_is_refused(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        make_trainer(tmp_path, **{"loss": "npo + sft", "train_dataset": rows(), "paired_retain": True, **change})
