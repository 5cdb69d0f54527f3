"""Checks that a row's tokens say what the row says, by decoding them: works for any template and tokenizer.

The scored tokens of a completion must contain its text, its thought and its calls, nothing of the prompt, and one end.
The context must contain every turn of the prompt, the tools and one beginning. Otherwise a finding shows both
texts. Imports transformers and this folder's `conversation`, `encodings`, `pieces` and `tokenize`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from prefopt.data.conversation import Processing, Row, answers_begin, read_tools, user_turn
from prefopt.data.encodings import Encodings
from prefopt.data.errors import DataError
from prefopt.data.pieces import (
    TAKEN,
    Piece,
    Space,
    contents_of,
    pieces_of,
    squeeze,
    thoughts_of,
    tools_of,
    without_thought,
)
from prefopt.data.tokenize import Tokens, shared, tokens_of


@dataclass(frozen=True)
class Finding:
    """A failed check: the kind of problem, and the texts side by side."""

    kind: str
    said: str


def round_trip(
    row: Row, sides: Sequence[str], tokens: Tokens, processing_class: Processing, encodings: Encodings | None = None
) -> list[Finding] | None:
    """The failed checks of a row and its `tokens`; None if it cannot be decoded (images).

    `encodings` answers for the tokenizer, if many rows share it.
    """
    encodings = Encodings(processing_class) if encodings is None else encodings
    if isinstance(row["prompt"], list):
        written = all(_is_text(message) for name in ("prompt", *sides) for message in row[name])
        if _has_images(row) or (not written and isinstance(processing_class, ProcessorMixin)):
            return None
        trip = _Trip(row, sides, tokens, encodings)
        return [*trip.context(), *(finding for index in range(len(sides)) for finding in trip.completion(index))]
    return list(_of_text(row, sides, tokens, encodings))


def _is_text(message: Any) -> bool:
    content = message.get("content")
    return all(_kind_of(part) == "text" for part in (content if isinstance(content, list) else ()))


def _kind_of(part: Any) -> Any:
    return part.get("type", "text") if isinstance(part, dict) else "text"


def _without(message: Row, kind: Any) -> Row:
    """The message without its parts of a kind."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [part for part in content if _kind_of(part) != kind]}


def _has_images(row: Row) -> bool:
    return any(row.get(name) for name in ("image", "images", "video", "videos", "audio", "audios"))


# ---- conversations ------------------------------------------------------------------------------------------------


class _Trip:
    """Decodes a conversation from its tokens."""

    def __init__(self, row: Row, sides: Sequence[str], tokens: Tokens, encodings: Encodings) -> None:
        self._row, self._sides, self._tokens, self._encodings = row, sides, tokens, encodings
        self._processing = encodings.processing_class
        self._space = Space(encodings)
        self._prompt, *self._completions = tokens.messages
        self._read = encodings.decode(tokens.prompt)

    def context(self) -> Iterator[Finding]:
        """The prompt's turns, tools and beginning."""
        if self._renders and not self._is_text(self._tokens.prompt, self._tokens.prompt_text, self._read):
            yield self._beside("tokens are not the row's", self._tokens.prompt_text, self._read, "context")
        tools = tools_of(read_tools(self._row.get("tools")))
        text = self._space.known(self._read)
        missing, left = self._space.take([*(p for m in self._prompt for p in pieces_of(m)), *tools], text)
        for piece in missing:
            if not self._is_switch(piece, text):
                yield self._beside(self._kind_of_missing(piece, tools, text), piece.text, self._read, "context")
        for kind in self._dropped_parts():
            yield Finding("prompt is not in the context", f"The template does not read its part of type {kind!r}.")
        for message, mark in zip(self._prompt, self._marks, strict=True):
            texts = [squeeze(piece.text) for piece in contents_of(message)]
            if any(len(text) >= 8 and text in left for text in texts) and self._replaced[0].count(mark) > 1:
                yield self._beside("prompt text twice", str(message["content"]), self._read, "context")
        yield from _beginning(self._tokens, self._encodings, plain=False)
        marks = self._encodings.turn_marks
        for piece in (p for name in ("prompt", *self._sides) for m in self._row[name] for p in contents_of(m)):
            if any(mark in piece.text for mark in marks):
                yield Finding("control token inside a text", f"The row says {_excerpt(piece.text)}.")
                return

    def completion(self, index: int) -> Iterator[Finding]:
        """One side: its text, nothing of the prompt, one end."""
        ids, whole = self._tokens.completions[index], self._tokens.texts[index]
        scored = self._encodings.decode(ids)
        text = self._space.known(scored)
        messages = self._completions[index]
        pieces = [piece for message in messages for piece in pieces_of(message)]
        missing, left = self._space.take(pieces, text)
        lost = [piece for piece in missing if not self._opened(piece, text)]
        for piece in lost[:1]:
            yield self._beside("completion is not scored", piece.text, scored, "scored tokens")
        if not lost and self._renders and not self._follows(index, scored, whole):
            yield self._beside("tokens are not the row's", whole, self._read + scored, "tokens")
        elif self._scores_prompt(index, text, left, whole):
            yield self._beside("prompt is scored", str(messages[-1].get("content") or ""), scored, "scored tokens")
        if self._tokens.clashes[index] and not lost:
            yield self._beside("generation prompt does not fit", whole, self._read + scored, "tokens")
        if not missing:
            tail = left.rpartition(TAKEN)[2]
            yield from _ending(ids, tail, scored, self._encodings)
            begin = self._space.known(answers_begin(self._processing))
            # A text of unknown characters only is found nowhere, so the text after it is not known either.
            if begin and begin in tail and left.count(TAKEN) == len(pieces):
                yield Finding("another answer begins", f"Scored tokens {_excerpt(scored)}.")

    def _dropped_parts(self) -> Iterator[str]:
        """Kinds of the prompt's parts that the template leaves out, or prints as Python does; never text."""
        if all(map(_is_text, self._row["prompt"])):
            return
        whole = self._tokens.prompt_text
        contents = [message.get("content") for message in self._prompt]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        for kind in dict.fromkeys(_kind_of(part) for part in parts if _kind_of(part) != "text"):
            others = [_without(message, kind) for message in self._row["prompt"]]
            if any(str(part) in whole for part in parts if _kind_of(part) == kind) or self._opening(others) == whole:
                yield str(kind)

    def _opening(self, prompt: list[Any]) -> str | None:
        """The text of another prompt; None if the template refuses it."""
        try:
            row = {**self._row, "prompt": prompt}
            return tokens_of(row, self._sides, self._processing, encodings=self._encodings).prompt_text
        except DataError:
            raise
        except Exception:
            return None

    @property
    def _renders(self) -> bool:
        """Whether the ids are those of the rendered text, and not from a method of the processor."""
        return self._encodings.renders

    def _is_text(self, ids: list[int], text: str, read: str) -> bool:
        # Some tokenizers change texts when decoding: then compare the ids.
        if read == text:
            return True
        known = self._tokens.encodings.get(text)
        return ids == (self._encodings.alone(text) if known is None else known)

    def _follows(self, index: int, scored: str, whole: str) -> bool:
        """Whether the completion's tokens are the end of the rendered conversation, after the context."""
        ids = self._tokens.completions[index]
        if not self._tokens.repaired[index]:
            return self._is_text(self._tokens.prompt + ids, whole, self._read + scored)
        alone = self._tokens.alone[index]
        return whole.endswith(alone) and self._is_text(ids, alone, scored)

    def _opened(self, piece: Piece, text: str) -> bool:
        """Whether the text begins in the generation prompt (an opening `<think>`) and continues where that ends."""
        before = self._space.known(self._read)
        return any(
            before.endswith(words[:cut]) and text.startswith(words[cut:])
            for words in self._space.forms(piece.text)
            for cut in range(1, min(len(words), 200))
        )

    def _is_switch(self, piece: Piece, text: str) -> bool:
        """Whether only words are left out that the template itself looks for, such as `/no_think`."""
        words = piece.text.split()
        template = str(getattr(self._processing, "chat_template", ""))
        other = " ".join(word for word in words if f"'{word}'" not in template and f'"{word}"' not in template)
        return len(other.split()) < len(words) and any(form in text for form in self._space.forms(other))

    def _kind_of_missing(self, piece: Piece, tools: list[Piece], text: str) -> str:
        if piece in tools:
            return "tools are not in the context"
        answers = [message for message in self._prompt if message.get("role") == "assistant"]
        if any(piece in thoughts_of(message) for message in answers):
            return "earlier thought is left out"
        rest = without_thought(piece) if any(piece in contents_of(message) for message in answers) else None
        if rest is not None and not self._space.take([rest], text)[0]:
            return "earlier thought is left out"
        return "prompt is not in the context"

    def _scores_prompt(self, index: int, text: str, left: str, whole: str) -> bool:
        head, found, _ = left.partition(TAKEN)
        if self._tokens.repaired[index] and found and head:
            # The first words that the template prints after the context differ from the context's.
            lead = self._space.known(whole).removesuffix(text)
            read = self._space.known(self._read)
            if read.startswith(lead) and _share_a_word(read[len(lead) :], head):
                return True
        texts = [squeeze(piece.text) for message in self._prompt for piece in contents_of(message)]
        # Words of the prompt may be the template's own: replace the prompt by marks to see which.
        return any(text in left for text in texts) and any(mark in self._replaced[1 + index] for mark in self._marks)

    @functools.cached_property
    def _marks(self) -> list[str]:
        return [f"qzx{'abcdefghij'[n % 10] * (1 + n // 10)}xzq" for n in range(len(self._row["prompt"]))]

    @functools.cached_property
    def _replaced(self) -> list[str]:
        """Context and scored texts of the row with a mark in place of each prompt message's content."""
        prompt = [
            {**message, "content": mark} if contents_of(message) else message
            for message, mark in zip(self._row["prompt"], self._marks, strict=True)
        ]
        try:
            row = {**self._row, "prompt": prompt}
            tokens = tokens_of(row, self._sides, self._processing, encodings=self._encodings)
        except DataError:
            raise
        except Exception:
            return [""] * (1 + len(self._sides))  # a template that reads contents: nothing can be said
        return [squeeze(self._encodings.decode(ids)) for ids in (tokens.prompt, *tokens.completions)]

    def _beside(self, kind: str, text: str, read: str, what: str) -> Finding:
        return Finding(kind, f"The row says {_excerpt(text)}, the {what} {_excerpt(read)}.")


def _share_a_word(left: str, right: str) -> bool:
    """Whether both begin with the same word; `<think>` and `<tool_call>` do not."""
    length = shared(left, right)
    words = left[:length]
    if all(text[length : length + 1].isalnum() for text in (left, right)):
        words = words.rstrip("".join(filter(str.isalnum, set(words))))
    return any(map(str.isalnum, words))


# ---- plain text ---------------------------------------------------------------------------------------------------


def _of_text(row: Row, sides: Sequence[str], tokens: Tokens, encodings: Encodings) -> Iterator[Finding]:
    space = Space(encodings)
    read = encodings.decode(tokens.prompt)
    if not _ends_with(read, row["prompt"], space):
        yield Finding(
            "tokens are not the row's", f"The row says {_excerpt(row['prompt'])}, the context {_excerpt(read)}."
        )
    for side, ids in zip(sides, tokens.completions, strict=True):
        scored = encodings.decode(ids)
        text = space.known(scored)
        own = next((form for form in space.forms(row[side]) if text.startswith(form)), None)
        if own is None:
            said = f"The row says {_excerpt(row[side])}, the scored tokens {_excerpt(scored)}."
            yield Finding("completion is not scored", said)
        else:
            yield from _ending(ids, text[len(own) :] or str(encodings.tokenizer.eos_token), scored, encodings)
    yield from _beginning(tokens, encodings, plain=True)


def _ends_with(read: str, text: str, space: Space) -> bool:
    if read.endswith(text):
        return True
    return any(space.known(read).endswith(form) for form in space.forms(text))


# ---- both ---------------------------------------------------------------------------------------------------------


def _beginning(tokens: Tokens, encodings: Encodings, plain: bool) -> Iterator[Finding]:
    """One beginning-of-text token, at the start of the context, if the tokenizer adds one."""
    tokenizer = encodings.tokenizer
    begin = tokenizer.bos_token_id
    if begin is None or begin == tokenizer.eos_token_id:
        return
    starts = next((n for n, token in enumerate(tokens.prompt) if token != begin), len(tokens.prompt))
    if starts > 1 or any(begin in ids[:1] for ids in tokens.completions):
        read = encodings.decode(tokens.prompt), encodings.decode(tokens.completions[0])
        yield Finding("second beginning of text", f"Context {_excerpt(read[0])}, scored tokens {_excerpt(read[1])}.")
    elif not plain and begin not in tokens.prompt and _adds_beginning(tokenizer):
        yield Finding("no beginning of text", f"Context {_excerpt(encodings.decode(tokens.prompt))}.")


@functools.lru_cache(maxsize=32)
def _adds_beginning(tokenizer: PreTrainedTokenizerBase) -> bool:
    return list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _ending(ids: list[int], tail: str, scored: str, encodings: Encodings) -> Iterator[Finding]:
    """`tail`: the text after the completion's own."""
    last: list[int] = []
    for token in reversed(ids):
        if token in encodings.ending:
            last.append(token)
        elif squeeze(encodings.decode([token])):
            break
    said = f"Scored tokens {_excerpt(scored)}."
    if not tail and not last:
        yield Finding("no end of turn", said)
    elif len(set(last)) < len(last) or (tail and squeeze(scored).endswith(2 * tail)):
        yield Finding("second end of turn", said)


def is_rendered(row: Row, sides: Sequence[str], encodings: Encodings) -> bool:
    """Whether plain text contains the marks that the chat template prints around a user's turn."""
    words = {mark for part in user_turn(encodings.processing_class) for mark in part.split()[-1:]}
    marks = encodings.turn_marks or words
    return any(mark in row[name] for name in ("prompt", *sides) for mark in marks)


def _excerpt(text: str, most: int = 90) -> str:
    """The text on one line, its middle left out where it is long."""
    line = text.replace("\n", "\\n")
    if len(line) > most:
        line = f"{line[: most * 2 // 3]} ... {line[-most // 3 :]}"
    return f"'{line}'"
