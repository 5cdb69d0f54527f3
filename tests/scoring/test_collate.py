"""Rows, roles, truncation, mismatched prompts and columns of a collated batch, and their way to the losses."""

from __future__ import annotations

import pytest
import torch

from prefopt.losses import parse
from prefopt.losses.scores import Role
from prefopt.scoring import RowGroups, TokenScores, assemble_batch
from prefopt.scoring.collate import PreferenceCollator, WithColumns
from prefopt.scoring.rows import RowBatch

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
]
LABELLED = [
    {"prompt_ids": [1], "completion_ids": [2, 3], "label": False},
    {"prompt_ids": [4], "completion_ids": [5], "label": True},
    {"prompt_ids": [6], "completion_ids": [7], "label": False},
]


def rows(batch) -> list[list[int]]:
    return [ids[real.bool()].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_pairs_become_chosen_rows_then_rejected_rows():
    batch = PreferenceCollator(pad_token_id=0)(PAIRS)
    assert rows(batch) == [[1, 2, 3, 4, 5], [7, 8, 9], [1, 2, 3, 6], [7, 8, 10, 11]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]
    assert batch["roles"].tolist() == [0, 0, 1, 1]
    assert batch["examples"].tolist() == [0, 1, 0, 1]
    assert bool(batch["paired"])


def test_labelled_completions_keep_their_order():
    batch = PreferenceCollator(pad_token_id=0)(LABELLED)
    assert rows(batch) == [[1, 2, 3], [4, 5], [6, 7]]
    assert batch["roles"].tolist() == [1, 0, 1]
    assert not bool(batch["paired"])


def test_mismatched_rows_move_completions_to_the_next_prompt():
    batch = PreferenceCollator(pad_token_id=0, mismatched=True)(LABELLED)
    assert rows(batch)[3:] == [[1, 7], [4, 2, 3], [6, 5]]
    assert batch["roles"].tolist() == [1, 0, 1, 2, 2, 2]


def test_a_lone_example_has_no_mismatched_row():
    assert len(PreferenceCollator(pad_token_id=0, mismatched=True)(LABELLED[:1])["roles"]) == 1


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("keep_start", [[1, 2, 3, 4], [7, 8, 9]]), ("keep_end", [[2, 3, 4, 5], [7, 8, 9]])],
)
def test_truncation(mode, expected):
    batch = PreferenceCollator(pad_token_id=0, max_length=4, truncation_mode=mode)(PAIRS)
    assert rows(batch)[:2] == expected


def test_padding_to_a_multiple():
    batch = PreferenceCollator(pad_token_id=9, pad_to_multiple_of=8)(PAIRS)
    assert batch["input_ids"].shape == (4, 8)
    assert batch["attention_mask"].sum() == 5 + 3 + 4 + 4
    assert batch["completion_mask"].sum() == 2 + 1 + 1 + 2


def test_reference_sums_and_columns_travel_with_the_batch():
    examples = [
        {**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0, "weight": 3, "gap": 0.5} for row in PAIRS
    ]
    batch = PreferenceCollator(pad_token_id=0, columns=("gap",))(examples)
    assert batch["ref_rejected_logps"].tolist() == [-2.0, -2.0]
    assert batch["column_weight"].tolist() == [3.0, 3.0]
    assert batch["column_gap"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "'gap' must hold a number in every row, found None"),
        (float("inf"), "'gap' must hold a finite number in every row, found inf"),
        (1.5, "'gap' must hold numbers from 0 to 1, found 1.5"),
    ],
)
def test_columns_of_a_stream_are_checked_as_rows_arrive(value, message):
    collator = PreferenceCollator(pad_token_id=0, columns=("gap",), limits={"gap": (0.0, 1.0)})
    assert collator([{**row, "gap": 1} for row in PAIRS])["column_gap"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=message):
        collator([{**row, "gap": value} for row in PAIRS])


def test_columns_are_added_to_what_another_collator_makes():
    def forgetful(examples):
        for example in examples:
            example.clear()
        return {"input_ids": torch.zeros(2, 1)}

    batch = WithColumns(forgetful, ("gap",))([{"gap": 1.0}, {"gap": 2.0}])
    assert batch["column_gap"].tolist() == [1.0, 2.0]


def test_a_collator_without_a_padding_token_says_so():
    with pytest.raises(ValueError, match="pad_token_id is not set"):
        PreferenceCollator()(PAIRS)


def test_rows_are_grouped_by_role():
    groups = RowGroups(
        roles=torch.tensor([1, 0, 1, 2]),
        examples=torch.tensor([0, 1, 2, 0]),
        columns={"weight": torch.tensor([1.0, 2.0, 3.0])},
        paired=False,
    )
    logps = torch.tensor([[-1.0, 0.0], [-2.0, -3.0], [-4.0, 0.0], [-9.0, 0.0]])
    mask = logps != 0
    policy = TokenScores(logps, torch.zeros_like(logps), mask, mask)
    batch = assemble_batch(groups, policy, parse("ld_dpo"), ref_token_logps=logps / 2)
    assert batch.chosen.logps.tolist() == [-5.0]
    assert batch.chosen.lengths.tolist() == [2]
    assert batch.chosen.columns["weight"].tolist() == [2.0]
    assert batch.rejected.ratios.tolist() == [-0.5, -2.0]
    assert batch.rejected.ref_token_logps.tolist() == [[-0.5, 0.0], [-2.0, 0.0]]
    assert batch.mismatched is None
    assert assemble_batch(groups, policy, parse("kto"), logps / 2).mismatched.ratios.tolist() == [-4.5]
    assert assemble_batch(groups, policy, parse("simpo")).chosen.token_logps is None
    forgetting = assemble_batch(groups, policy, parse("npo + sft"), ref_token_logps=logps / 2)
    assert forgetting.chosen.ref_logps is None
    assert forgetting.rejected.ref_logps.tolist() == [-0.5, -2.0]


def test_selected_rows_are_cut_to_the_longest_of_them():
    batch = RowBatch.of(PreferenceCollator(pad_token_id=0)(PAIRS))
    rejected = batch.select_rows(batch.roles == Role.REJECTED)
    longest = int(batch.attention[batch.roles == Role.REJECTED].sum(-1).max())
    assert rejected.ids.shape == (len(PAIRS), longest)
    assert set(rejected.roles.tolist()) == {1}
    assert rejected.paired


def test_every_selected_row_still_plays_its_role():
    roles, ids = torch.tensor([0, 1, 0, 1, 0]), torch.ones(5, 3, dtype=torch.long)
    rows = {"input_ids": ids, "attention_mask": ids, "completion_mask": ids}
    batch = RowBatch.of({**rows, "roles": roles, "examples": torch.arange(5), "paired": torch.tensor(False)})
    for role in (Role.CHOSEN, Role.REJECTED):
        selected = batch.select_rows(batch.roles == role)
        assert selected.rows_of(role).tolist() == list(range(int((roles == role).sum())))


def test_sampled_completions_become_rows_of_their_own():
    batch = RowBatch.of(PreferenceCollator(pad_token_id=0)(PAIRS))
    prompts = [torch.tensor(pair["prompt_ids"]) for pair in PAIRS]
    completions = [torch.arange(1, 2 + 20 * i) for i in range(len(PAIRS))]
    more = batch.append(prompts, completions, pad_token_id=0)
    assert more.ids.shape[0] == 3 * len(PAIRS)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        row = 2 * len(PAIRS) + i
        assert more.ids[row][more.attention[row].bool()].tolist() == [
            *prompt.tolist(),
            *completion.tolist(),
        ]
        assert more.ids[row][more.completion[row].bool()].tolist() == completion.tolist()
        assert (int(more.roles[row]), int(more.examples[row])) == (3, i)
    width = batch.ids.shape[1]
    assert torch.equal(more.ids[: 2 * len(PAIRS), :width], batch.ids)
