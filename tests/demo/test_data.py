"""The bundled pairs: every chosen answer follows the rule, every rejected one breaks it, and nothing leaks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import get_args

import pytest

from prefopt.demo import data
from prefopt.demo.rule import follows_rule

SPLITS: tuple[data.Split, ...] = get_args(data.Split)


@pytest.mark.parametrize("split", SPLITS)
def test_chosen_follow_and_rejected_break_the_rule(split: data.Split) -> None:
    for row in data.read_rows(split):
        assert follows_rule(row["chosen"][0]["content"]), row
        assert not follows_rule(row["rejected"][0]["content"]), row


@pytest.mark.parametrize("split", SPLITS)
def test_rejected_answers_are_finished_sentences(split: data.Split) -> None:
    """The model ended them itself; one that stopped in mid-sentence would teach it to stop anywhere."""
    unfinished = [row for row in data.read_rows(split) if row["rejected"][0]["content"][-1] not in ".!?\"')"]
    assert len(unfinished) <= 0.05 * len(data.read_rows(split))


@pytest.mark.parametrize("split", SPLITS)
def test_files_are_the_ones_that_were_made(split: data.Split) -> None:
    file = data.DATA_FOLDER / f"{split}.jsonl"
    made = data.metadata()["files"][file.name]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == made["sha256"]
    assert len(data.read_rows(split)) == made["pairs"]
    assert file.stat().st_size < 400_000


def test_sizes_are_worth_training_on() -> None:
    assert 130 <= len(data.read_rows("train")) <= 260
    assert 40 <= len(data.read_rows("heldout")) <= 60


def test_train_and_heldout_share_nothing() -> None:
    train, heldout = data.read_rows("train"), data.read_rows("heldout")
    for read in (lambda row: row["prompt"][-1]["content"].lower(), lambda row: row["chosen"][0]["content"]):
        seen = {read(row) for row in train}
        assert len(seen) == len(train)
        assert not seen & {read(row) for row in heldout}


def test_topics_belong_to_one_split() -> None:
    heads = [
        line[1:].split(":") for line in (data.DATA_FOLDER / "questions.txt").read_text().splitlines() if line[0] == "#"
    ]
    topics = {split: {topic.strip() for name, topic in heads if name.strip() == split} for split in SPLITS}
    assert len(topics["train"]) > 10
    assert len(topics["heldout"]) > 4
    assert not topics["train"] & topics["heldout"]


def test_datasets_have_trl_columns() -> None:
    dataset = data.load_demo("train")
    assert dataset.column_names == ["prompt", "chosen", "rejected"]
    assert [message["role"] for message in dataset[0]["prompt"]] == ["system", "user"]
    assert {dataset[0][side][0]["role"] for side in ("chosen", "rejected")} == {"assistant"}
    assert data.heldout_prompts() == [row["prompt"] for row in data.load_demo("heldout")]


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train.jsonl", "metadata.json"):
        (tmp_path / name).write_bytes((data.DATA_FOLDER / name).read_bytes())
    monkeypatch.setattr(data, "DATA_FOLDER", tmp_path)
    assert data.read_rows("train")
    (tmp_path / "train.jsonl").write_text('{"prompt": []}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl is not the demo data that was shipped.*Reinstall"):
        data.load_demo("train")


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="no demo split 'test': there are train and heldout"):
        data.load_demo("test")  # type: ignore[arg-type]
