"""The Python API and streams check rows as `prefopt check` does: refused by name and number, or told once."""

from __future__ import annotations

import functools
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.data import DataError
from prefopt.data.prepare import rows_are_checked
from prefopt.safety.errors import UsageError
from tests.tiny import THINKING, make_tokenizer
from tests.trainer.runs import save_model, settings

PAIRS = [{"prompt": f"Say {i}.", "chosen": f" It is {i}.", "rejected": f" No, {i}."} for i in range(3)]
LABELLED = [{"prompt": f"Say {i}.", "completion": f" It is {i}.", "label": i % 2 == 0} for i in range(4)]


def talk(prompt: Any = None, chosen: Any = "So.", rejected: Any = "No.") -> dict[str, Any]:
    asked = [{"role": "user", "content": "Why?"}] if prompt is None else prompt
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": asked} | {
        name: [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        for name, side in sides.items()
    }


@functools.cache
def saved() -> str:
    return save_model(Path(tempfile.mkdtemp()))


TALKS = [talk(), talk([{"role": "user", "content": "How?"}])]


def build(folder: Path, rows: Any, **options: Any) -> Any:
    data = rows if not isinstance(rows, list) else Dataset.from_list(rows)
    arguments = {"processing_class": options.pop("processing_class", make_tokenizer())}
    return PreferenceTrainer(
        saved(),
        args=PreferenceConfig(**settings(folder, max_steps=2, **options)),
        train_dataset=data,
        **arguments,
    )


BAD = {
    "null": (PAIRS, {"chosen": None}, "null chosen"),
    "empty": (PAIRS, {"chosen": ""}, "empty chosen"),
    "equal": (PAIRS, {"chosen": " a", "rejected": " a"}, "chosen equals rejected"),
    "no messages": (TALKS, {"chosen": []}, "empty chosen"),
    "prefill": (
        TALKS,
        {"prompt": [{"role": "user", "content": "Give JSON."}, {"role": "assistant", "content": "{"}]},
        "prompt ends with assistant",
    ),
    "a thought in a field": (
        TALKS,
        {"chosen": [{"role": "assistant", "content": "So.", "reasoning_content": "Let me see."}]},
        "completion is not scored",
    ),
    "cut alike": (PAIRS, {"chosen": " a" * 60 + "b", "rejected": " a" * 60 + "c"}, "same tokens at this length"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_by_name_and_number(tmp_path: Path, name: str, streaming: bool) -> None:
    good, change, kind = BAD[name]
    data = Dataset.from_list([*good, {**good[0], **change}])
    with pytest.raises(DataError, match=kind) as caught:
        build(tmp_path, data.to_iterable_dataset() if streaming else data, max_length=32).train()
    place = f"row {len(good)} (from 0) of the streamed train set" if streaming else f"1 row, first {len(good)}."
    assert place in str(caught.value)
    assert "train set" in str(caught.value)


IDS = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 11, 2]}
BAD_IDS = {
    "empty prompt": ({"prompt_ids": []}, "no tokens"),
    "empty completion": ({"chosen_ids": []}, "no tokens"),
    "null": ({"rejected_ids": None}, "wrong type: ids"),
    "a mask's number": ({"chosen_ids": [8, -100]}, "wrong type: ids"),
    "equal": ({"rejected_ids": IDS["chosen_ids"]}, "chosen equals rejected"),
    "cut alike": ({"chosen_ids": [8] * 40 + [3], "rejected_ids": [8] * 40 + [4]}, "same tokens at this length"),
    "weight": ({"weight": -1.0}, "bad weight"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BAD_IDS)
def test_a_bad_row_of_token_ids_is_refused_by_name_and_number(tmp_path: Path, name: str, streaming: bool) -> None:
    change, kind = BAD_IDS[name]
    good = {**IDS, **({"weight": 1.0} if "weight" in change else {})}
    data = Dataset.from_list([good, good, {**good, **change}])
    with pytest.raises(DataError, match=kind) as caught:
        build(tmp_path, data.to_iterable_dataset() if streaming else data, max_length=32).train()
    place = "row 2 (from 0) of the streamed train set" if streaming else "1 row, first 2."
    assert place in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_beside_token_ids_are_never_guessed(tmp_path: Path, streaming: bool) -> None:
    rows = [{"prompt_ids": [5], "completion_ids": [6, 7], "label": label} for label in ("true", "false")]
    data = Dataset.from_list(rows)
    with pytest.raises(DataError, match="wrong type: label"):
        build(tmp_path, data.to_iterable_dataset() if streaming else data, loss="kto").train()


def test_token_ids_that_leave_no_room_are_dropped_and_cut_ones_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt_ids": [5] * 40}, {"chosen_ids": [8] * 40, "rejected_ids": [9] * 40}
    trainer = build(tmp_path, [IDS, *({**IDS, **change} for change in long)], max_length=32)
    assert [len(ids) for ids in trainer.train_dataset["prompt_ids"]] == [3, 3]
    assert "dropped 1 of 3 rows of the train set" in warned(caplog)
    assert warned(caplog).count("truncated completion") == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["torch", "numpy"])
@pytest.mark.parametrize("row", [IDS, PAIRS[0]])
def test_sets_that_give_tensors_are_read_as_lists(
    tmp_path: Path, row: dict[str, Any], form: str, streaming: bool
) -> None:
    rows: list[list[int]] = []
    for data in (Dataset.from_list([row]), Dataset.from_list([row]).with_format(form)):
        trainer = build(tmp_path, data.to_iterable_dataset() if streaming else data)
        rows.append(next(iter(trainer.get_train_dataloader()))["input_ids"].tolist())
    assert rows[0] == rows[1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("labels", [["true", "false"], [1, -1], [1.0, 0.0], ["chosen", "rejected"], [True, None]])
def test_labels_are_never_guessed(tmp_path: Path, labels: list[Any], streaming: bool) -> None:
    data = Dataset.from_list([{**row, "label": label} for row, label in zip(LABELLED, labels, strict=False)])
    with pytest.raises(DataError, match="wrong type: label"):
        build(tmp_path, data.to_iterable_dataset() if streaming else data, loss="kto").train()


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_written_as_integers_are_read(tmp_path: Path, streaming: bool) -> None:
    data = Dataset.from_list([{**row, "label": int(row["label"])} for row in LABELLED])
    trainer = build(tmp_path, data.to_iterable_dataset() if streaming else data, loss="kto", seed=0)
    roles = next(iter(trainer.get_train_dataloader()))["roles"].tolist()
    assert set(roles) >= {0, 1}


def test_evaluation_sets_are_checked_too(tmp_path: Path) -> None:
    trainer = build(tmp_path, PAIRS)
    with pytest.raises(DataError, match="null rejected"):
        trainer.evaluate(Dataset.from_list([*PAIRS, {**PAIRS[0], "rejected": None}]))


def warned(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize("streaming", [False, True])
def test_warnings_and_notes_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, streaming: bool) -> None:
    rows = [*PAIRS, {**PAIRS[0], "chosen": " a" * 40, "rejected": " b" * 40}]
    data = Dataset.from_list(rows * 2)
    build(tmp_path, data.to_iterable_dataset() if streaming else data, max_length=32).train()
    text = warned(caplog)
    assert text.count("truncated completion") == 1
    assert text.count("chat template is not applied") == 1
    assert text.count("duplicate row") == (0 if streaming else 1)


def test_sound_rows_raise_no_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path, TALKS, processing_class=make_tokenizer(THINKING))
    assert "set" not in warned(caplog)
    assert set(trainer.train_dataset.column_names) >= {"prompt_ids", "chosen_ids", "rejected_ids"}
    assert not [name for name in trainer.train_dataset.column_names if "found" in name]


@pytest.mark.parametrize(("loss", "told"), [("kto", True), ("npo", False), ("sft", False)])
def test_labels_of_one_kind_are_told_where_both_are_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, loss: str, told: bool
) -> None:
    build(tmp_path, [{**row, "label": loss == "sft"} for row in LABELLED], loss=loss)
    assert ("has the label" in warned(caplog)) is told


def test_rows_that_a_recipe_has_checked_are_not_checked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rows_are_checked():
        build(tmp_path, PAIRS * 2)
    assert "duplicate" not in warned(caplog)
    stream = Dataset.from_list([*PAIRS, {**PAIRS[0], "chosen": None}]).to_iterable_dataset()
    with rows_are_checked():
        trainer = build(tmp_path, stream)
    with pytest.raises(DataError, match="null chosen"):
        trainer.train()


def test_an_evaluation_set_and_a_stream_without_rows_are_named(tmp_path: Path) -> None:
    rows = Dataset.from_list(PAIRS)
    with pytest.raises(DataError, match="the eval set has no rows"):
        PreferenceTrainer(
            saved(), args=PreferenceConfig(**settings(tmp_path)), train_dataset=rows, eval_dataset=rows.select([]),
            processing_class=make_tokenizer(),
        )  # fmt: skip
    with pytest.raises(UsageError, match="the training data has no rows"):
        build(tmp_path, rows.to_iterable_dataset().filter(lambda row: False))
