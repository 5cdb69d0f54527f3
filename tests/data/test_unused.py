"""Columns that could matter and are not used are named once; ids and the like never; empty images are no images."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.data import DataError, normalise
from tests.tiny import make_model, make_tokenizer

Row = dict[str, Any]
PAIR = {"prompt": "How are you?", "chosen": "Arr.", "rejected": "Fine."}
CHAT = {
    "prompt": [{"role": "user", "content": "Hi."}],
    "chosen": [{"role": "assistant", "content": "Ho."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def lines(row: Row, **options: Any) -> list[str]:
    said: list[str] = []
    normalise(Dataset.from_list([row]), say=said.append, **options)
    return said


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"system": "Pirate."}, "Columns not used: system (--columns system=system puts it in front of the prompt)."),
        ({"system_prompt": "Pirate."}, "--columns system=system_prompt"),
        ({"input": "at sea"}, "--columns input=input appends it to the prompt"),
        ({"context": "at sea"}, "--columns input=context"),
        ({"score_chosen": 4.0, "score_rejected": 1.0}, "score_chosen, score_rejected (a 'weight' weighs rows"),
        ({"margin": 1.0}, "margin (a 'weight' weighs rows, a 'margin' is read by margin_dpo"),
        ({"chosen_score": 1.0}, "chosen_score (a 'weight' weighs rows"),
        ({"sample_weight": 2.0}, "sample_weight (a 'weight' weighs rows"),
        ({"initial_reason_steps": "Step 1: sail"}, "initial_reason_steps (if the answers continue it, write it in"),
        ({"prefix": "Arr, I"}, "prefix (if the answers continue it"),
        ({"images": ["a.png"]}, "images (read by vision models only)"),
        ({"tools": '[{"name": "f"}]'}, "tools (tools belong to conversations"),
    ],
)
def test_what_could_matter_is_named_in_one_line(more: Row, told: str) -> None:
    (line,) = lines({**PAIR, **more})
    assert told in line


@pytest.mark.parametrize(
    "more",
    [
        {"id": "1", "source": "x", "category": "sea", "model": "m", "chosen_model": "n", "timestamp": 3},
        {"system": "", "input": None, "images": [], "margin": None, "tools": "[]"},
        {"weight": 2.0},
        {"prefix": "How are", "previous_steps": ""},
        {"prefill": "Arr."},
        {"input": "How are you?", "context": "How are you?"},
        {"score": "good", "rating": "5 stars"},
    ],
)
def test_no_word_about_what_does_not_matter(more: Row) -> None:
    assert lines({**PAIR, **more}) == []


def test_what_is_used_is_not_named() -> None:
    assert lines({**PAIR, "margin": 1.0}, used=("margin",)) == []
    assert lines({**CHAT, "tools": '[{"name": "f"}]'}) == []


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("empty", [[], "", None, [None], [""]])
def test_an_empty_column_of_images_is_dropped(empty: Any, streaming: bool) -> None:
    dataset: Any = Dataset.from_list([{**CHAT, "images": empty}] * 2)
    read = list(normalise(dataset.to_iterable_dataset() if streaming else dataset))
    assert read == [CHAT, CHAT]


def test_images_that_come_late_in_a_stream_are_named() -> None:
    rows = [{**CHAT, "images": [""]}] * 64 + [{**CHAT, "images": ["a.png"]}]
    stream = normalise(Dataset.from_list(rows).to_iterable_dataset())
    with pytest.raises(DataError, match=r"Row 64 \(from 0\) of the stream has 'images'"):
        list(stream)
    assert "images" in normalise(Dataset.from_list(rows), say=lambda line: None).column_names


def test_the_trainer_drops_empty_images_and_names_what_it_does_not_use(tmp_path: Any, caplog: Any) -> None:
    rows = Dataset.from_list([{**CHAT, "images": [], "system": "Pirate."}] * 4)
    args = PreferenceConfig(
        str(tmp_path), loss="dpo", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    make_model().save_pretrained(tmp_path / "tiny")
    trainer = PreferenceTrainer(
        str(tmp_path / "tiny"), args=args, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer()
    )
    assert caplog.text.count("Columns not used: system (--columns system=system") == 1
    trainer.train()
    assert trainer.state.global_step == 1
