"""Texts to ids and ids to texts, many at a time: a batch of rows asks the tokenizer a few times, not once a text.

The ids are those that the tokenizer gives for each text alone. It imports transformers and `conversation`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

from prefopt.data.conversation import Processing, answers_begin, answers_end, user_turn
from prefopt.data.splits import cuts_words, first_word, last_word, splits_at


class Encodings:
    """What a tokenizer answers for the texts of one batch of rows, each text encoded or decoded once.

    Texts are encoded in pieces, cut where the tokenizer splits them anyway: conversations before control tokens, plain
    texts between two words. The prompt of a row is then encoded once, not once with every completion.

    Args:
        processing_class: the tokenizer, or the processor that contains it.
    """

    def __init__(self, processing_class: Processing) -> None:
        self.processing_class = processing_class
        self.tokenizer = text_tokenizer(processing_class)
        self._pieces: dict[str, list[int]] = {}
        self._cuts: dict[str, list[str]] = {}
        self._plain: dict[str, list[int]] = {}
        self._texts: dict[tuple[int, ...], str] = {}

    @functools.cached_property
    def renders(self) -> bool:
        """Whether conversations are rendered and tokenized by transformers' own method, not by a processor's."""
        method = getattr(type(self.processing_class), "apply_chat_template", None)
        return method is PreTrainedTokenizerBase.apply_chat_template

    # ---- texts to ids ---------------------------------------------------------------------------------------------

    def alone(self, text: str) -> list[int]:
        """A text's own ids, without any that the tokenizer adds."""
        pieces = self._split(text)
        self._encode(pieces)
        if len(pieces) == 1:
            return list(self._pieces[text])
        return [token for piece in pieces for token in self._pieces[piece]]

    def plain(self, text: str) -> list[int]:
        """Plain text with the special tokens that the tokenizer adds, except those that the text already has."""
        ids = self._plain.get(text)
        if ids is None:
            ids = self.processing_class(text=text)["input_ids"]
            # Processors of images and text answer in batches of one.
            ids = list(ids[0] if isinstance(self.processing_class, ProcessorMixin) else ids)
        begin = self.tokenizer.bos_token_id
        return list(ids[1:] if begin is not None and ids[:2] == [begin, begin] and self._begins_once(text) else ids)

    def encode_ahead(self, texts: Iterable[str]) -> None:
        """Encode the rendered conversations that `alone` will be asked for, if no processor has its own way."""
        if self.renders:
            self.encode_alone_ahead(texts)

    def encode_alone_ahead(self, texts: Iterable[str]) -> None:
        """Encode the texts that `alone` will be asked for."""
        self._encode([piece for text in texts for piece in self._split(text)])

    def encode_plain_ahead(self, rows: Sequence[Sequence[str]]) -> None:
        """Encode the texts that `plain` will be asked for, if no processor has a method of its own for them.

        Args:
            rows: of each row its prompt, and the prompt with each completion.
        """
        if not self._own_encode or self.tokenizer is not self.processing_class:
            return
        wanted = [text for text in dict.fromkeys(text for row in rows for text in row) if text not in self._plain]
        if self._added is not None:
            for prompt, *wholes in rows:
                self._cut(prompt, wholes)
            before, after = self._added
            cut = [text for text in wanted if text in self._cuts]
            self.encode_alone_ahead(cut)
            self._plain.update((text, [*before, *self.alone(text), *after]) for text in cut)
            wanted = [text for text in wanted if text not in self._cuts]
        self._plain.update(zip(wanted, self._encode_all(wanted, special=True), strict=True))

    def _cut(self, prompt: str, wholes: Sequence[str]) -> None:
        """Cut a row's texts between the last two words of the prompt and between the first two of each completion."""
        end = last_word(prompt)
        for whole in wholes:
            start = first_word(own := whole[len(prompt) :])
            self._keep_cuts(own, start)
            self._keep_cuts(whole, end, start and len(prompt) + start)
        self._keep_cuts(prompt, end)

    def _keep_cuts(self, text: str, *places: int) -> None:
        cuts = [0, *(place for place in places if place), len(text)]
        if len(cuts) > 2:
            self._cuts[text] = [text[a:b] for a, b in pairwise(cuts)]

    @functools.cached_property
    def _added(self) -> tuple[list[int], list[int]] | None:
        """The ids that the tokenizer adds before and after a plain text; None if plain texts are not cut."""
        if not cuts_words(self.tokenizer, len(self.tokenizer)):
            return None
        own, ids = (list(self.tokenizer("a b", add_special_tokens=special)["input_ids"]) for special in (False, True))
        starts = (place for place in range(len(ids)) if ids[place : place + len(own)] == own)
        before = next(starts, None)
        return None if before is None else (ids[:before], ids[before + len(own) :])

    def _encode(self, pieces: Sequence[str]) -> None:
        wanted = [piece for piece in dict.fromkeys(pieces) if piece not in self._pieces]
        if wanted:
            self._pieces.update(zip(wanted, self._encode_all(wanted, special=False), strict=True))

    def _encode_all(self, texts: list[str], special: bool) -> list[list[int]]:
        if len(texts) > 1 and self._own_encode:
            first = list(self.tokenizer(texts[0], add_special_tokens=special)["input_ids"])  # also sets the backend up
            backend = self.tokenizer.backend_tokenizer
            return [first, *(one.ids for one in backend.encode_batch_fast(texts[1:], add_special_tokens=special))]
        return [list(self.tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]

    def _split(self, text: str) -> list[str]:
        if text in self._cuts:
            return self._cuts[text]
        if self._control is None:
            return [text]
        starts = [found.start() for found in self._control.finditer(text)]
        return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True) if a < b] or [text]

    @functools.cached_property
    def _control(self) -> re.Pattern[str] | None:
        if not self.renders or not self._own_encode:
            return None
        probes = *user_turn(self.processing_class), answers_begin(self.processing_class)
        marks = tuple(mark for mark in (*probes, answers_end(self.processing_class)) if mark)
        return splits_at(self.tokenizer, marks, len(self.tokenizer))

    @functools.cached_property
    def _own_encode(self) -> bool:
        kind = type(self.tokenizer)
        methods = "__call__", "_encode_plus", "set_truncation_and_padding"
        return isinstance(self.tokenizer, PreTrainedTokenizerFast) and all(
            getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in methods
        )

    def _begins_once(self, text: str) -> bool:
        token = str(self.tokenizer.bos_token)
        return text.startswith(token) and not text.startswith(2 * token)

    # ---- ids to texts ---------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        key = tuple(ids)
        if key not in self._texts:
            text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            self._texts[key] = str(text)
        return self._texts[key]

    def decode_ahead(self, lists: Iterable[Sequence[int]]) -> None:
        """Decode the ids that `decode` will be asked for."""
        kind = type(self.tokenizer)
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast) or any(
            getattr(kind, name) is not getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode")
        ):
            return
        wanted = [key for key in dict.fromkeys(map(tuple, lists)) if key not in self._texts]
        texts = self.tokenizer.backend_tokenizer.decode_batch(list(map(list, wanted)), skip_special_tokens=False)
        self._texts.update(zip(wanted, texts, strict=True))

    # ---- facts about the tokenizer --------------------------------------------------------------------------------

    @functools.cached_property
    def ending(self) -> frozenset[int]:
        """Ids of special tokens, which may end a completion."""
        tokenizer = self.tokenizer
        return frozenset({*tokenizer.all_special_ids, tokenizer.eos_token_id} - {tokenizer.unk_token_id})

    @functools.cached_property
    def turn_marks(self) -> frozenset[str]:
        """The control tokens around a user's text, and those that begin and end texts."""
        around = " ".join(user_turn(self.processing_class)) + answers_end(self.processing_class)
        marks = {token for token in _special_tokens(self.tokenizer) if token in around}
        return frozenset(
            marks | {str(token) for token in (self.tokenizer.bos_token, self.tokenizer.eos_token) if token}
        )


def text_tokenizer(processing_class: Processing) -> PreTrainedTokenizerBase:
    """The tokenizer itself, which a multimodal processor contains."""
    if isinstance(processing_class, ProcessorMixin):
        tokenizer: PreTrainedTokenizerBase = processing_class.tokenizer
        return tokenizer
    return processing_class


@functools.lru_cache(maxsize=32)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    added = tokenizer.added_tokens_decoder.values()
    return frozenset([*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)])
