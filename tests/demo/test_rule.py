"""The visible rule on answers that a person would judge the same way."""

from __future__ import annotations

import pytest

from prefopt.demo.rule import MAX_WORDS, explain, follows_rule, sentences

FOLLOWING = [
    "A bridge carries loads across a gap by spreading them to its supports.",
    "Paris.",
    "It holds about 3.5 liters of water.",
    "The U.S. has fifty states.",
    "Dr. Smith found it.",
    "Surely the moon pulls the sea towards it.",
    "Some plants, e.g. cacti, store water in their stems.",
    'He said "stop."',
    "  Wool traps air, which keeps heat in.  ",
    " ".join(["word"] * MAX_WORDS) + ".",
]

BREAKING = [
    ("", "empty"),
    ("  \n ", "empty"),
    ("It is salty. Rivers carry salt.", "2 sentences"),
    ("First heat the pan\nThen add oil.", "2 sentences"),
    ("1. Heat the pan.", "2 sentences"),
    ("Really? Yes!", "2 sentences"),
    ("Oranges have vitamin C. It helps.", "2 sentences"),
    ("It opens at 9 a.m. You can wait.", "2 sentences"),
    (" ".join(["word"] * (MAX_WORDS + 1)) + ".", f"{MAX_WORDS + 1} words"),
    ("The sea is salty because", "no full stop"),
    ("Steps to follow:", "no full stop"),
    ("Sure, wool traps air.", 'opens with "Sure"'),
    ("certainly! Wool traps air.", "opens with"),
    ("Of course wool is warm.", "opens with"),
    ("Here\u2019s how wool keeps us warm.", "opens with"),
    ("Here is a list.", "opens with"),
    ("Great question, wool traps air.", "opens with"),
]


@pytest.mark.parametrize("answer", FOLLOWING)
def test_a_short_plain_sentence_follows(answer: str) -> None:
    assert explain(answer) == []
    assert follows_rule(answer)


@pytest.mark.parametrize(("answer", "reason"), BREAKING)
def test_what_breaks_the_rule_is_named(answer: str, reason: str) -> None:
    assert not follows_rule(answer)
    assert any(reason in line for line in explain(answer))


def test_every_broken_part_is_named() -> None:
    assert len(explain("Sure! " + "word " * 30)) == 4


def test_sentences_keep_their_words() -> None:
    assert sentences("It costs 2.50 dollars. Is that dear? No!\n- a list") == [
        "It costs 2.50 dollars.",
        "Is that dear?",
        "No!",
        "- a list",
    ]
