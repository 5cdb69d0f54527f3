"""Messages about columns that are missing or misnamed name the exact `--columns` to pass."""

from __future__ import annotations

import pytest
from datasets import Dataset

from prefopt.data import DataError, normalise


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ["question", "response_j", "response_k"],
            r"question, response_j, response_k\..*--columns prompt=question chosen=response_j rejected=response_k\.$",
        ),
        (["prompt", "winner", "loser"], r"--columns chosen=winner rejected=loser\.$"),
        (["promt", "chosen", "rejeted"], r"--columns prompt=promt rejected=rejeted\.$"),
        (["instruction", "Response_Chosen", "rejected"], r"--columns prompt=instruction chosen=Response_Chosen\.$"),
        (["query", "answer", "thumbs_up"], r"--columns prompt=query completion=answer label=thumbs_up\.$"),
        (["conversations", "label"], r"--columns messages=conversations\.$"),
        (["question", "answer"], r"'question' and 'answer'.* no column looks like label.*supervised fine-tuning"),
        (["prompt", "chosen"], r"No column looks like rejected"),
        (["alpha", "omega"], r"None of them looks like a needed one"),
    ],
)
def test_missing_columns_get_the_mapping_to_pass(columns: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        normalise(Dataset.from_list([dict.fromkeys(columns, "text")]))


def test_aliases_are_never_taken_silently_but_the_mapping_works() -> None:
    rows = Dataset.from_list([{"question": "q", "response_j": "a", "response_k": "b", "score": 0.5}])
    mapping = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    assert normalise(rows, mapping)[0] == {"prompt": "q", "chosen": "a", "rejected": "b", "score": 0.5}
