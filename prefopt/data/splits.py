"""Where a text can be cut so that the ids of its pieces, one after the other, are the ids of the whole.

Tokenizers look for added tokens in a text, from left to right, and split what lies between them by patterns; what they
have split apart never shares an id. Every cut is tried on a text before one of the user's is cut there.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

_TRIAL = "{0}a  b\n{0}\n c{1} {0}{1}.{0}"
"""With two control tokens in it."""
_WORDS = (
    "Don't say so: he's 27 (or 3.14) years old\n\n\tif x_1 != y:\r\n  return  None  # done !!  "
    "\u00dcber \u00e9l\u00e8ve caf\u00e9 \u0441\u043b\u043e\u0432\u043e \u0434\u043e\u043c \u4e2d\u6587 "
    "\u5b57 \ud55c\uad6d \ub9d0 A B CamelCase x"
)
"""With words of several scripts between signs, digits and white space."""
_GAP = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
"""Between two words: after a letter, before a space and a letter."""
_NEAR = 200
"""Characters within which a cut is looked for."""


def last_word(text: str) -> int:
    """Where the last word of a text begins, with the space before it; 0 if the end of the text has none."""
    start = max(len(text) - _NEAR, 0)
    return max((found.start() for found in _GAP.finditer(text, start)), default=0)


def first_word(text: str) -> int:
    """Where the first word of a text ends that another follows; 0 if its beginning has none."""
    found = _GAP.search(text, 0, _NEAR)
    return found.start() if found else 0


@functools.lru_cache(maxsize=32)
def cuts_words(tokenizer: PreTrainedTokenizerBase, _: int) -> bool:
    """Whether the tokenizer always splits texts between two words.

    It does with byte pair encoding after a pattern that cuts there, as in GPT-2, Llama 3 and Qwen. It does not where
    white space is a part of the text like any other (Llama 2), nor with added tokens of several words.
    """
    model = _model_of(tokenizer)
    if model.get("type") != "BPE" or _varies(tokenizer, model):
        return False
    if any(map(_reaches_over_a_gap, tokenizer.added_tokens_decoder.values())) or not _cuts_at_gaps(tokenizer):
        return False
    return _same_in_pieces(tokenizer, _WORDS, _GAP)


def _reaches_over_a_gap(token: Any) -> bool:
    """Whether an added token may hold both sides of a gap between words, or take the space of one."""
    text = token.content
    takes = (token.rstrip and text[-1:].isalpha()) or (token.lstrip and text[:1].isalpha())
    return bool(takes or re.search(r"[^\W\d_]\s", text))


def _cuts_at_gaps(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the patterns that split a text before its pairs are joined cut it at every gap of the trial."""
    split = tokenizer.backend_tokenizer.pre_tokenizer
    if split is None:
        return False
    starts = {start for _, (start, _) in split.pre_tokenize_str(_WORDS)}
    return all(found.start() in starts for found in _GAP.finditer(_WORDS))


def _model_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str()).get("model") or {}
    return model


def _varies(tokenizer: PreTrainedTokenizerBase, model: Mapping[str, Any]) -> bool:
    """Whether equal texts may get other ids, or added tokens are not looked for."""
    return bool(model.get("dropout") or getattr(tokenizer, "split_special_tokens", False))


def _same_in_pieces(tokenizer: PreTrainedTokenizerBase, text: str, pattern: re.Pattern[str]) -> bool:
    """Whether a text has the same ids if it is cut where the pattern begins."""
    cuts = [found.start() for found in pattern.finditer(text)]
    pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)]) if a < b]
    ids = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    return ids == list(tokenizer(text, add_special_tokens=False)["input_ids"])


@functools.lru_cache(maxsize=32)
def splits_at(tokenizer: PreTrainedTokenizerBase, marks: tuple[str, ...], _: int) -> re.Pattern[str] | None:
    """Matches the control tokens within `marks` at which a text can be split and encoded in pieces, with equal ids.

    The ids on both sides of a token depend on their own side alone, if the token is always recognised: no other added
    token contains it or may begin before it and overlap it, and none takes white space from it. None if no token
    qualifies.
    """
    added = list(tokenizer.added_tokens_decoder.values())
    others = {token.content for token in added}
    within = [token for token in added if any(token.content in mark for mark in marks)]
    safe = [token.content for token in within if _stands_alone(token) and not _overlapped(token.content, others)]
    if not safe or _varies(tokenizer, _model_of(tokenizer)):
        return None
    pattern = re.compile("|".join(map(re.escape, sorted(safe))))
    return pattern if _same_in_pieces(tokenizer, _TRIAL.format(safe[0], safe[-1]), pattern) else None


def _stands_alone(token: Any) -> bool:
    text = token.content
    looks_around = token.lstrip or token.rstrip or token.single_word or token.normalized
    return bool(text) and text == text.strip() and not looks_around and not (text[0].isalnum() or text[0] == "_")


def _overlapped(token: str, others: set[str]) -> bool:
    """Whether another token may be recognised in its place: one that contains it, or ends with its beginning."""
    return any(
        token in other or any(other.endswith(token[:length]) for length in range(1, len(token)))
        for other in others
        if other != token
    ) or any(token.endswith(token[:length]) for length in range(1, len(token)))
