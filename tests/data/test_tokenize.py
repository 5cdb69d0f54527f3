"""Token ids equal TRL's where the prompt begins the whole, and keep the whole prompt where it does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from trl.data_utils import _tokenize as trl_tokenize

from prefopt.data import tokenize_dataset, tokenize_row
from tests.tiny import CHATML, THINKING, make_tokenizer


def assistant(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How does a bridge work?"}]
PAIR = {"prompt": ASK, "chosen": assistant("It carries loads."), "rejected": assistant("The fox jumps.")}


def trl_ids(row: dict[str, Any], side: str, processing_class: Any) -> tuple[list[int], list[int]]:
    """What TRL's `_prepare_dataset` computes for one side: the prompt's ids, and the ids of both together."""
    if isinstance(row["prompt"], str):
        text = row[side] if row[side].endswith("<|im_end|>") else row[side] + "<|im_end|>"
        prompt, whole = row["prompt"], row["prompt"] + text
        return tuple(trl_tokenize(processing_class, part)["input_ids"] for part in (prompt, whole))  # type: ignore
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    arguments = {"tools": tools, **row.get("chat_template_kwargs", {})}
    return (
        trl_tokenize(processing_class, row["prompt"], add_generation_prompt=True, **arguments)["input_ids"],
        trl_tokenize(processing_class, row["prompt"] + row[side], **arguments)["input_ids"],
    )


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"c": 1}}}]}]
ANSWERED = [*CALL, {"role": "tool", "content": "sun"}, *assistant("It is sunny.")]


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {**PAIR, "chosen": ANSWERED, "tools": TOOLS},
        {**PAIR, "chosen": ANSWERED, "tools": json.dumps(TOOLS)},
        {"prompt": "How does a bridge work?", "chosen": " It carries loads.", "rejected": " No.<|im_end|>"},
    ],
)
def test_ids_equal_trl_where_the_prompt_begins_the_whole(row: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    ours = tokenize_row(row, tokenizer)
    assert ours["boundary"] is False
    for side in ("chosen", "rejected"):
        prompt_ids, whole = trl_ids(row, side, tokenizer)
        assert (ours["prompt_ids"], ours["prompt_ids"] + ours[f"{side}_ids"]) == (prompt_ids, whole)


def test_chat_template_arguments_reach_the_template() -> None:
    tokenizer = make_tokenizer(CHATML.replace("assistant\n{% endif %}", "assistant\n{{ mood }}{% endif %}"))
    ours = tokenize_row({**PAIR, "chat_template_kwargs": {"mood": "gloomy", "unset": None}}, tokenizer)
    assert tokenizer.decode(ours["prompt_ids"]).endswith("assistant\ngloomy")
    assert tokenizer.decode(ours["chosen_ids"]) == "It carries loads.<|im_end|>\n"


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1, max_size=20), chosen=st.text(max_size=20), rejected=st.text(max_size=20))
def test_any_text_keeps_its_whole_prompt_and_completion(prompt: str, chosen: str, rejected: str) -> None:
    tokenizer = make_tokenizer()
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    ours = tokenize_row(row, tokenizer)
    assert ours["prompt_ids"] == trl_tokenize(tokenizer, prompt)["input_ids"]
    for side in ("chosen", "rejected"):
        prompt_ids, whole = trl_ids(row, side, tokenizer)
        if whole[: len(prompt_ids)] == prompt_ids:
            assert ours["prompt_ids"] + ours[f"{side}_ids"] == whole
        assert tokenizer.decode(ours[f"{side}_ids"]) == tokenizer.decode(
            tokenizer(row[side] if row[side].endswith("<|im_end|>") else row[side] + "<|im_end|>")["input_ids"]
        )


def test_thinking_template_keeps_the_whole_prompt() -> None:
    tokenizer = make_tokenizer(THINKING)
    ours = tokenize_row(PAIR, tokenizer)
    assert ours["boundary"] is True
    assert tokenizer.decode(ours["prompt_ids"]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(ours["chosen_ids"]) == "It carries loads.<|im_end|>\n"
    assert tokenizer.decode(ours["rejected_ids"]) == "The fox jumps.<|im_end|>\n"


@pytest.mark.parametrize("text", ["<html>", "<think>\nHm.</think>\n\nYes.", "<", "a", "assistant\n"])
def test_a_completion_that_begins_like_the_generation_prompt_stays_whole(text: str) -> None:
    tokenizer = make_tokenizer(THINKING)
    ours = tokenize_row({**PAIR, "chosen": assistant(text)}, tokenizer)
    assert tokenizer.decode(ours["chosen_ids"]) == f"{text}<|im_end|>\n"


def test_each_completion_is_decided_on_its_own() -> None:
    tokenizer = make_tokenizer(THINKING)
    row = {**PAIR, "rejected": assistant("<think>\n\n</think>\n\nThe fox.")}
    ours = tokenize_row(row, tokenizer)
    prompt_ids, whole = trl_ids(row, "rejected", tokenizer)
    if whole[: len(prompt_ids)] == prompt_ids:
        assert ours["prompt_ids"] + ours["rejected_ids"] == whole
    assert tokenizer.decode(ours["rejected_ids"]) == "The fox.<|im_end|>\n"
    assert tokenizer.decode(ours["chosen_ids"]) == "It carries loads.<|im_end|>\n"


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """`b` and `c` merge into one token wherever they meet."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "d": 3, "bc": 4, "</s>": 5}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.Split("</s>", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_a_merge_across_the_boundary_keeps_the_context() -> None:
    ours = tokenize_row({"prompt": "ab", "chosen": "cd", "rejected": "dd"}, merging_tokenizer())
    # "abcd" is a|bc|d: TRL would leave only "a" as the context, for the rejected side too.
    assert ours == {"prompt_ids": [0, 1], "chosen_ids": [2, 3, 5], "rejected_ids": [3, 3, 5], "boundary": True}


def test_unpaired_rows() -> None:
    ours = tokenize_row({"prompt": "ab", "completion": "d", "label": True}, merging_tokenizer())
    assert ours == {"prompt_ids": [0, 1], "completion_ids": [3, 5], "boundary": False}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_gains_id_columns_once(streaming: bool) -> None:
    dataset = Dataset.from_list([{**PAIR, "weight": 1.0}] * 3)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    tokenizer = make_tokenizer()
    tokenized = tokenize_dataset(dataset, tokenizer, desc="Tokenizing")
    row = next(iter(tokenized))
    assert set(row) == {"prompt", "chosen", "rejected", "weight", "prompt_ids", "chosen_ids", "rejected_ids"}
    assert row["prompt_ids"] == tokenize_row(PAIR, tokenizer)["prompt_ids"]
    assert tokenize_dataset(tokenized, tokenizer) is tokenized


class TextProcessor(ProcessorMixin):  # type: ignore[misc]
    """A multimodal processor as text meets it: batches of one, templates that take lists of parts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.tokenizer(text)["input_ids"]]}

    def apply_chat_template(
        self, messages: list[dict[str, Any]], tokenize: bool, return_dict: bool = False, **rest: Any
    ):
        assert all(isinstance(message["content"], list) for message in messages)
        flat = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in messages]
        result = self.tokenizer.apply_chat_template(flat, tokenize=tokenize, return_dict=return_dict, **rest)
        return {"input_ids": [result["input_ids"]]} if tokenize else result


@pytest.mark.parametrize("template", [CHATML, THINKING])
@pytest.mark.parametrize("row", [PAIR, {"prompt": "a", "chosen": " b", "rejected": " c"}])
def test_a_processor_gives_its_tokenizers_ids(template: str, row: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(template)
    assert tokenize_row(row, TextProcessor(tokenizer)) == tokenize_row(row, tokenizer)
