"""All checks of one row, from a file, a recipe, the Python API or a stream.

Nothing here changes a row. It may import transformers and the rest of this folder except `validate`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from prefopt.data.conversation import Processing, Row
from prefopt.data.encodings import Encodings, text_tokenizer
from prefopt.data.errors import DataError
from prefopt.data.groups import is_group, spread
from prefopt.data.problems import KINDS
from prefopt.data.round_trip import is_rendered, round_trip
from prefopt.data.row import TOLD, Checked, check_texts, number_problems
from prefopt.data.templates import template_trouble
from prefopt.data.tokenize import Tokens, id_columns, tokens_ahead, tokens_of


@dataclass(frozen=True)
class RowCheck:
    """All checks of a row that need no other row.

    Attributes:
        sides: the columns of completions.
        columns: the columns of the data.
        processing_class: makes the ids; without it the row's own ids are checked, if any.
        max_length: longest prompt and completion, in tokens.
        truncation_mode: which end is cut: "keep_start" cuts completions, "keep_end" prompts.
        vocabulary: number of tokens with embeddings in the model.
    """

    sides: tuple[str, ...]
    columns: tuple[str, ...]
    processing_class: Processing | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    vocabulary: int | None = None

    def __call__(self, row: Row) -> Checked:
        return self.batch([row])[0]

    def batch(self, rows: Sequence[Row]) -> list[Checked]:
        """The result for each row; all texts of the rows are encoded, and all ids decoded, at once."""
        # Rows of a stream may lack a key that other rows have.
        labelled = self.sides == ("completion",)
        needed = ("prompt", *self.sides, "label") if labelled else ("prompt", *self.sides)
        rows = [{**dict.fromkeys(needed), **row} for row in rows]
        results = [check_texts(row, self.sides, self.columns) for row in rows]
        tokens: list[Tokens | None] = [None] * len(rows)
        encodings = None if self.processing_class is None else Encodings(self.processing_class)
        if encodings is not None and "prompt_ids" not in self.columns:
            readable = [number for number, checked in enumerate(results) if checked.readable]
            ahead = tokens_ahead([spread(rows[number], self.sides) for number in readable], encodings)
            for number, row_tokens in zip(readable, ahead, strict=True):
                tokens[number] = row_tokens
        for row, checked, row_tokens in zip(rows, results, tokens, strict=True):
            # Rows with broken texts cannot be compared or tokenized.
            if checked.readable:
                told = any(problem in TOLD for problem in checked.problems)
                checked.problems.extend(self._token_problems(row, told, checked, encodings, row_tokens))
        return results

    def of_ids(self, row: Row) -> Checked:
        """The result for a row of token ids; its texts, if any, need not be readable."""
        checked = Checked(list(number_problems(row, self.sides, list(self.columns))))
        found = self._token_problems(row, False, checked)
        # Whether their texts differ is not known.
        equal = "all completions are equal" if is_group(self.sides) else "chosen equals rejected"
        checked.problems.extend(equal if kind == "same tokens" else kind for kind in found)
        return checked

    def _token_problems(
        self,
        row: Row,
        told: bool,
        checked: Checked,
        encodings: Encodings | None = None,
        tokens: Tokens | None = None,
    ) -> Iterator[str]:
        """Problems of a row's tokens.

        Args:
            row: with texts or ids.
            told: its texts are known to be empty or equal, so that their tokens are as well.
            checked: receives ids and details.
            encodings: answers for the tokenizer, if the row is to be tokenized.
            tokens: the row's, if they were made ahead.
        """
        if "prompt_ids" in row:
            if not all(self._are_ids(ids) for ids in self._given_ids(row)):
                yield "wrong type: ids"
                return
            prompt, *completions = self._given_ids(row)
        elif encodings is not None:
            row, sides = spread(row, self.sides)
            try:
                if tokens is None:
                    tokens = tokens_of(row, sides, encodings.processing_class, encodings=encodings)
                found = [] if told else self._read_back(row, sides, tokens, encodings)
            except DataError:
                raise
            except Exception as error:
                kind, said = self._refused(error, isinstance(row["prompt"], list))
                checked.said[kind] = said
                yield kind
                return
            prompt, completions = tokens.prompt, list(tokens.completions)
            checked.ids = id_columns(tokens, self.sides)
            checked.plain = self._is_plain(row, sides, encodings)
            for kind, said in found:
                checked.said.setdefault(kind, said)
            # If there is no token at all, the missing part was already named.
            if all(completions):
                yield from dict.fromkeys(kind for kind, _ in found)
        else:
            return
        yield from self._length_problems(prompt, completions, told)

    def _length_problems(self, prompt: list[int], completions: list[list[int]], told: bool) -> Iterator[str]:
        equal = len(completions) > 1 and all(ids == completions[0] for ids in completions[1:])
        if told:
            pass
        elif not prompt or not all(completions):
            yield "no tokens"
        elif equal:
            yield "same tokens"
        ids = (prompt, *completions)
        if self.vocabulary is not None and max(map(max, filter(None, ids)), default=0) >= self.vocabulary:
            yield "beyond the vocabulary"
        if self.max_length is None:
            return
        starts = self.truncation_mode == "keep_start"
        if starts and len(prompt) >= self.max_length:
            yield "no room for a completion"
        elif len(completions) > 1 and not told and not equal and self._cut_alike(prompt, completions):
            yield "same tokens at this length"
        elif any(len(c) + (len(prompt) if starts else 0) > self.max_length for c in completions):
            yield "truncated completion"

    def _cut_alike(self, prompt: list[int], completions: list[list[int]]) -> bool:
        """Whether all completions are the same after the collator's cut."""
        end = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-(self.max_length or 0), None)
        first, *others = ((prompt + completion)[end] for completion in completions)
        return all(other == first for other in others)

    def _read_back(
        self, row: Row, sides: Sequence[str], tokens: Tokens, encodings: Encodings
    ) -> list[tuple[str, str]]:
        findings = round_trip(row, sides, tokens, encodings.processing_class, encodings)
        if findings is None:
            return [("prompt is not a token prefix (not read back)", "")] if any(tokens.repaired) else []
        found = [(finding.kind, f" {finding.said}") for finding in findings]
        clear = not any(tokens.clashes) and not any(KINDS[kind].severity == "error" for kind, _ in found)
        if any(tokens.repaired) and clear:
            found.append(("prompt is not a token prefix", ""))
        return found

    def _is_plain(self, row: Row, sides: Sequence[str], encodings: Encodings) -> bool:
        template = getattr(self.processing_class, "chat_template", None)
        if not template or not isinstance(row["prompt"], str):
            return False
        return not is_rendered(row, sides, encodings)

    def _given_ids(self, row: Row) -> list[Any]:
        """The row's own ids, of the prompt and of each completion."""
        prompt, *sides = (row.get(f"{name}_ids") for name in ("prompt", *self.sides))
        return [prompt, *sides[0]] if is_group(self.sides) and isinstance(sides[0], list) else [prompt, *sides]

    def _are_ids(self, value: Any) -> bool:
        whole = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
        known = None if self.processing_class is None else _size(text_tokenizer(self.processing_class))
        return whole and (known is None or max(value, default=0) < known)

    def _refused(self, error: Exception, by_template: bool) -> tuple[str, str]:
        if by_template:
            if not getattr(self.processing_class, "chat_template", None):
                raise DataError(
                    "The rows are conversations, but the tokenizer has no chat template. Take the tokenizer of the "
                    "model's chat version; or give a recipe a template with --chat_template FILE (the repository has "
                    "configs/papers/hh.jinja for Human/Assistant dialogues, and zephyr.jinja beside it); or write "
                    "prompt and completions as plain text."
                ) from error
            if isinstance(error, TemplateSyntaxError | SecurityError):
                raise DataError(template_trouble(error)) from error
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".") or type(error).__name__
        kind = "refused by the chat template" if by_template else "refused by the tokenizer"
        return kind, f" The first said: {reason}."


@functools.lru_cache(maxsize=32)
def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer)
