"""Many rows at once give what each row gives alone: ids, verdicts, details."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Regex
from tokenizers.normalizers import Prepend, Strip
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken

from prefopt.data import DataError
from prefopt.data.conversation import answers_end, user_turn
from prefopt.data.encodings import Encodings
from prefopt.data.row_check import RowCheck
from prefopt.data.splits import cuts_words, first_word, last_word, splits_at
from prefopt.data.tokenize import tokens_ahead, tokens_of
from tests.data.test_shipped_templates import TEMPLATES, TOOLS, call, tokenizer_for
from tests.data.test_tokenize import merging_tokenizer
from tests.tiny import CHATML, THINKING, make_tokenizer

SIDES = ("chosen", "rejected")
WORDS = [
    "Is it so?",
    "néant",
    "答案是八",
    "🙂 yes",
    "{",
    'say "so"',
    "line\n\nline",
    "  padded  ",
    "<b>",
    "7",
    "<|im_end|>",
]


def talk(rng: random.Random) -> dict[str, Any]:
    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))

    def answer() -> dict[str, Any]:
        thought = rng.choice(["", "", f"<think>\n{text()}\n</think>\n\n"])
        calls = rng.choice([None, None, [], [call({"city": text()})]])
        return {"role": "assistant", "content": thought + text(), "tool_calls": calls}

    prompt: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] * rng.randint(0, 1)
    for _ in range(rng.randint(0, 2)):
        prompt += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
    prompt.append({"role": "user", "content": text()})
    return {"prompt": prompt, "chosen": [answer()], "rejected": [answer()], "tools": rng.choice([None, TOOLS])}


def plain(rng: random.Random) -> dict[str, Any]:
    return {name: " ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for name in ("prompt", *SIDES)}


BROKEN: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": None, "rejected": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "b"},
    {"prompt": "", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "chosen": "\ud800", "rejected": "c"},  # half of a surrogate pair
    {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
    {"prompt": [{"role": "user", "content": "\ud800"}], "chosen": [{"role": "assistant", "content": "b"}]},
    {"prompt": [], "chosen": [], "rejected": []},
    {
        "prompt": [{"role": "tool", "content": "a"}, {"role": "system", "content": "b"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
        "chat_template_kwargs": {"enable_thinking": None},
    },
]


@pytest.mark.parametrize("name", ["tiny", "thinking", *sorted(TEMPLATES)])
def test_a_batch_gives_what_each_row_gives_alone(name: str) -> None:
    tokenizer = make_tokenizer(THINKING) if name == "thinking" else tokenizer_for(name)
    rng = random.Random(0)
    rows = [*BROKEN, *(talk(rng) for _ in range(10)), *(plain(rng) for _ in range(4))]
    rng.shuffle(rows)
    check = RowCheck(SIDES, ("prompt", *SIDES, "tools"), tokenizer, max_length=48)
    alone = [check(row) for row in rows]
    assert check.batch(rows) == alone
    assert len({problem for checked in alone for problem in checked.problems}) > 5
    assert sum(checked.ids is not None for checked in alone) >= 4


def test_ids_are_those_of_the_whole_text() -> None:
    """In pieces or whole, with one call or many."""
    tokenizer = make_tokenizer()
    encodings = Encodings(tokenizer)
    texts = [tokenizer.apply_chat_template(talk(random.Random(n))["prompt"], tokenize=False) for n in range(30)]
    encodings.encode_ahead(texts[:20])
    encodings.encode_plain_ahead([[text] for text in texts[:20]])
    for text in texts:
        assert encodings.alone(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encodings.plain(text) == tokenizer(text)["input_ids"]
        assert encodings.decode(encodings.alone(text)) == tokenizer.decode(tokenizer(text)["input_ids"])


def control_tokens(tokenizer: Any) -> Any:
    return splits_at(tokenizer, (*user_turn(tokenizer), answers_end(tokenizer)), len(tokenizer))


def test_a_text_is_split_where_the_tokenizer_splits_it() -> None:
    assert control_tokens(make_tokenizer()).split("<|im_start|>a<|im_end|>b") == ["", "a", "b"]
    no_control = make_tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}")
    assert control_tokens(no_control) is None


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<|im_start|>user", normalized=False),  # contains it
        AddedToken("x<|im", normalized=False),  # may begin before it and overlap it
        AddedToken("<|im_start|>", lstrip=True, normalized=False),  # takes the white space before it
    ],
)
def test_a_text_is_not_split_at_a_token_that_others_change(token: AddedToken) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([token])
    pattern = control_tokens(tokenizer)
    assert pattern is None or not pattern.search("<|im_start|>")
    text = "x<|im_start|>user\n <|im_start|>a<|im_end|>\n"
    assert Encodings(tokenizer).alone(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


PROMPTS = [
    "What is it",
    "She said so.\n\n",
    "a",
    "",
    "nothing but\n",
    "two  spaces ",
    "It's 5 km to my",
    "café au la",
    "中文 字 x y",
]
ANSWERS = [" a b", "It is so", "lait noir", "\n\nFirst things", "", " ", "s more", "ing so far", "<|im_end|> now then"]


@pytest.mark.parametrize("begins", [False, True])
def test_plain_texts_in_pieces_have_the_ids_of_the_whole(begins: bool) -> None:
    tokenizer = make_tokenizer()
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A <|im_end|>",
            special_tokens=[(one, tokenizer.convert_tokens_to_ids(one)) for one in ("<|im_start|>", "<|im_end|>")],
        )
    rows = [[prompt, *(prompt + answer for answer in ANSWERS)] for prompt in PROMPTS]
    encodings = Encodings(tokenizer)
    encodings.encode_plain_ahead(rows)
    assert len(encodings._cuts) > 40
    for prompt, *wholes in rows:
        for text in (prompt, *wholes):
            assert encodings.plain(text) == tokenizer(text)["input_ids"]
            own = text[len(prompt) :]
            assert encodings.alone(own) == tokenizer(own, add_special_tokens=False)["input_ids"]


def test_where_a_plain_text_is_cut() -> None:
    assert last_word("one two three") == len("one two")
    assert last_word("one two, 3\n\n") == len("one")
    assert first_word(" one two three") == len(" one")
    assert first_word("one\ntwo") == last_word("") == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_tokens([AddedToken("New York", normalized=False)]),
        lambda t: t.add_tokens([AddedToken("word", rstrip=True, normalized=False)]),
        lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", Split(Regex(r"[.,]"), "isolated")),
        lambda t: setattr(t.backend_tokenizer, "normalizer", Strip()),
        lambda t: setattr(t.backend_tokenizer, "normalizer", Prepend("_")),
        lambda t: setattr(t, "split_special_tokens", True),
    ],
)
def test_plain_texts_are_not_cut_where_the_tokenizer_may_not_split_them(change: Any) -> None:
    tokenizer = make_tokenizer()
    assert cuts_words(tokenizer, len(tokenizer))
    tokenizer = make_tokenizer()
    change(tokenizer)
    assert not cuts_words(tokenizer, len(tokenizer))
    encodings = Encodings(tokenizer)
    encodings.encode_plain_ahead([["in New York", "in New York and a word or two"]])
    for text in ("in New York", "in New York and a word or two"):
        assert encodings.plain(text) == tokenizer(text)["input_ids"]


def test_a_template_that_does_not_end_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt.data.templates.SECONDS", 0.2)
    tokenizer = make_tokenizer(
        CHATML + "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    rows = [talk(random.Random(n)) for n in range(3)]
    with pytest.raises(DataError, match="not done with one conversation"):
        RowCheck(SIDES, ("prompt", *SIDES), tokenizer).batch(rows)


def test_a_tokenizer_with_its_own_method_is_asked_text_by_text() -> None:
    class Shouting(type(make_tokenizer())):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *arguments: Any, **keywords: Any) -> Any:
            loud = text.upper() if isinstance(text, str) else [one.upper() for one in text]
            return super()._encode_plus(loud, *arguments, **keywords)

    tokenizer = make_tokenizer()
    tokenizer.__class__ = Shouting
    rows = [talk(random.Random(n)) for n in range(4)]
    for row, checked in zip(rows, RowCheck(SIDES, ("prompt", *SIDES), tokenizer).batch(rows), strict=True):
        assert checked.ids is not None
        tokens = tokens_of(row, SIDES, tokenizer)
        expected = make_tokenizer()(tokens.prompt_text.upper(), add_special_tokens=False)["input_ids"]
        assert checked.ids["prompt_ids"] == tokens.prompt == expected


def test_completions_that_merge_with_their_prompt_are_encoded_together_and_as_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, rng = merging_tokenizer(), random.Random(5)
    rows = [
        {name: "".join(rng.choices("abcd", k=rng.randint(1, 6))) for name in ("prompt", *SIDES)} for _ in range(300)
    ]
    expected = [tokens_of(row, SIDES, tokenizer) for row in rows]
    repaired = [side for tokens in expected for side in tokens.repaired]
    assert 20 < sum(repaired) < len(repaired)
    encodings, calls = Encodings(tokenizer), []
    encode = encodings._encode_all

    def counted(texts: list[str], special: bool) -> list[list[int]]:
        calls.append(len(texts))
        return encode(texts, special)

    monkeypatch.setattr(encodings, "_encode_all", counted)
    assert tokens_ahead([(row, SIDES) for row in rows], encodings) == expected
    assert len(calls) == 2
