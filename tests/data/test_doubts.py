"""Lines about what the first rows make doubtful."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefopt.data.doubts import doubts
from prefopt.data.read import read_preferences

PAIR = {"prompt": "Legs?", "chosen": "Eight.", "rejected": "Six."}


def test_texts_that_repeat_their_prompt_are_named() -> None:
    pair = {"prompt": "Legs?", "chosen": "Legs? Eight.", "rejected": "Legs? Six."}
    assert "In 2 of the first 2 rows" in next(doubts([pair, pair]))
    assert not [*doubts([pair, {**pair, "rejected": "Six."}])]


def test_prompts_that_are_lists_of_texts_are_named_and_json_answers_are_not() -> None:
    assert "2 of the first 2 prompts are JSON lists" in next(doubts([{**PAIR, "prompt": '["Legs?"]'}] * 2))
    assert not [*doubts([{**PAIR, "chosen": '["Eight."]', "rejected": '["Six."]'}])]


def test_scores_that_prefer_the_rejected_side_are_named_until_the_sides_are_chosen(tmp_path: Path) -> None:
    row = {**PAIR, "chosen_score": 1.0, "rejected_score": 9.0}
    assert "pass --columns chosen=rejected rejected=chosen" in next(doubts([row]))
    assert not [*doubts([{**row, "chosen_score": 9.0}])]
    assert not [*doubts([row, {**row, "chosen_score": 9.5}])]
    path = tmp_path / "scored.jsonl"
    path.write_text(json.dumps(row))
    said: list[Any] = []
    swapped = read_preferences(str(path), columns={"chosen": "rejected", "rejected": "chosen"}, say=said.append)
    assert swapped[0]["chosen"] == "Six."
    assert not any("below" in line for line in said)
