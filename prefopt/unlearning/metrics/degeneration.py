"""Does a model still write text? A model that was pushed too far answers every question with noise or one word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefopt.evaluation.arrays import Floats, text_list
from prefopt.evaluation.texts import repetition
from prefopt.safety.errors import UsageError

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Degeneration:
    """What is wrong with N generated texts, as shares in [0, 1].

    Attributes:
        repetition: (N,) of `repetition`, over words.
        non_words: (N,) share of words that occur in none of the known texts; numbers are words.
        gibberish: (N,) share of letter triples, word beginnings and ends included, that occur in none of the known
            texts. A new name has mostly known triples, random letters do not.
        empty: (N,) whether a text has no word; its shares are 0.
    """

    repetition: Floats
    non_words: Floats
    gibberish: Floats
    empty: NDArray[np.bool_]


def degeneration(texts: Sequence[str], known_texts: Iterable[str], n: int = 4) -> Degeneration:
    """Repetition, non-words and gibberish of generated texts, without a second model.

    Not for languages that do not separate words. Ordinary text has shares above 0, which depend on the known texts:
    compare with the model before unlearning, on the same questions.

    Args:
        texts: N generated texts.
        known_texts: text of the same language and subject, such as all questions and answers of the data set.
        n: words per repeated sequence.
    """
    generated = text_list("texts", texts)
    if not generated:
        raise UsageError("there are no texts to look at")
    words, triples = set[str](), set[str]()
    for known in text_list("known_texts", list(known_texts) if not isinstance(known_texts, str) else known_texts):
        words.update(_words(known))
    if not words:
        raise UsageError("the known texts hold no words")
    for word in words:
        triples.update(_triples(word))
    shares = []
    for text in generated:
        own = _words(text)
        unknown = [word for word in own if word not in words and not word.isnumeric()]
        letters = [triple for word in own for triple in _triples(word)]
        strange = [triple for triple in letters if triple not in triples]
        shares.append((repetition(own, n), _share(unknown, own), _share(strange, letters)))
    repeated, non_words, gibberish = np.array(shares, dtype=np.float64).T
    return Degeneration(repeated, non_words, gibberish, np.array([not _words(text) for text in generated]))


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]


def _triples(word: str) -> list[str]:
    """None of a number, as any digits follow one another."""
    marked = f"^{word}$"
    return [] if word.isnumeric() else [marked[i : i + 3] for i in range(len(marked) - 2)]


def _share(part: Sequence[str], whole: Sequence[str]) -> float:
    return len(part) / len(whole) if whole else 0.0
