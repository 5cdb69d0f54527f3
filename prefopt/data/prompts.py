"""Where the prompt of a pair is without a column `prompt`: at the start of both completions, or in another column.

Cutting it out of plain answers would train on half an answer without its question, so unclear cases are errors
that ask. Imports this folder's columns and messages.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from prefopt.data.columns import ALIASES, column_names, first_rows, is_metadata
from prefopt.data.errors import DataError
from prefopt.data.formats import IMPLICIT
from prefopt.data.maps import MESSAGES, PEEKED_ROWS, map_rows
from prefopt.data.messages import SPEAKERS, as_messages, in_turns, plain_text, role, same_texts, without_nulls, writing

Row = Mapping[str, Any]

CONTEXT = ("input", "history", "system")
"""Columns that become part of the prompt if they are mapped: its end, turns before it, a system message first."""

_SHARING = 0.9
"""Minimum share of rows whose two texts have a common start if the prompt is there; the rest are bad rows."""
_DISTINCT_FROM = 4
"""From this many rows on, one beginning in all rows counts as a phrase of the answers, not as a prompt."""


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The shared beginning of two whole conversations or texts, and the rest of each.

    Messages: the leading messages that are equal. Text: the common prefix, cut back to a word boundary, the space
    before the first differing word going to the completions (that is how tokenizers cut words). At least one message
    or character stays in each completion.
    """
    most = min(len(chosen), len(rejected))
    shared = shared_length(chosen, rejected, most)
    if shared == most:
        # One is the beginning of the other, or both are equal: the last item stays in the completion.
        shared = max(0, most - 1)
    if isinstance(chosen, str):
        # Scripts without spaces have no boundary to go back to: keep what is shared.
        shared = _word_boundary(chosen, rejected, shared) or shared
        shared -= shared > 0 and chosen[shared - 1] == " "
    return chosen[:shared], chosen[shared:], rejected[shared:]


def shared_length(left: Any, right: Any, most: int) -> int:
    """How many items two texts or lists of messages begin with alike, `most` at most."""
    if isinstance(left, str) and isinstance(right, str):
        same, differs = 0, most + 1
        while differs - same > 1:  # halving: Python compares texts fast, and single characters slowly
            half = (same + differs) // 2
            same, differs = (half, differs) if left[:half] == right[:half] else (same, half)
        return same
    return next((at for at in range(most) if not same_texts(left[at], right[at])), most)


def _word_boundary(left: str, right: str, cut: int) -> int:
    def splits_a_word(at: int) -> bool:
        return any(side[at - 1 : at].isalnum() and side[at : at + 1].isalnum() for side in (left, right))

    while cut > 0 and splits_a_word(cut):
        cut -= 1
    return cut


def check_implicit(names: Sequence[str], rows: Sequence[Row]) -> None:
    """Refuses pairs without a column `prompt` if the prompt may not be at the start of chosen and rejected.

    Raises:
        DataError: naming the column that looks like the prompt and the `--columns` to pass, or saying that both sides
            are answers.
    """
    pairs = [row for row in rows if _comparable(row.get("chosen"), row.get("rejected"))]
    shared = [extract_prompt(row["chosen"], row["rejected"])[0] for row in pairs]
    if any(isinstance(part, list) for part in shared):
        # In whole conversations the roles show what the prompt is.
        whole = [any(role(message) == "user" for message in part) for part in shared if isinstance(part, list)]
        if 2 * sum(whole) > len(whole):
            return
    candidates = _candidates(names, pairs or rows, shared)
    if candidates:
        raise DataError(_ask(candidates, names, rows))
    if pairs and not _are_prompts(pairs, shared):
        raise DataError(_answers_only(pairs, shared))


def refuse_to_guess(dataset: Dataset | IterableDataset) -> None:
    """`check_implicit` for rows that others will cut prompts from.

    Raises:
        DataError: as there.
    """
    names = column_names(dataset)
    if "prompt" not in names and {"chosen", "rejected"} <= set(names):
        check_implicit(names, first_rows(dataset, PEEKED_ROWS))


def _comparable(chosen: Any, rejected: Any) -> bool:
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if not (texts or (isinstance(chosen, list) and isinstance(rejected, list))):
        return False
    return bool(chosen and rejected) and not same_texts(chosen, rejected)


def _are_prompts(pairs: Sequence[Row], shared: Sequence[Any]) -> bool:
    """Whether the two sides share whole words in (nearly) every row, and not one phrase in all rows."""
    if any(isinstance(part, list) for part in shared):
        return False
    whole = [
        bool(part.strip()) and _ends_word(part, row["chosen"], row["rejected"])
        for row, part in zip(pairs, shared, strict=True)
    ]
    one_phrase = len(pairs) >= _DISTINCT_FROM and len(set(shared)) == 1
    return sum(whole) >= _SHARING * len(whole) and not one_phrase


def _ends_word(part: str, chosen: str, rejected: str) -> bool:
    """The share ends where a word does on both sides; scripts without spaces need two characters and more."""
    at = len(part)
    inside = any(part[-1].isalnum() and side[at : at + 1].isalnum() for side in (chosen, rejected))
    return not inside or (at > 1 and not part.isascii())


def _candidates(names: Sequence[str], rows: Sequence[Row], shared: Sequence[Any]) -> list[str]:
    """Columns that may be the prompt, clearest name first; those repeated at the start of both sides are left out."""
    by_alias = {alias: place for place, alias in enumerate((*ALIASES["prompt"], *ALIASES["messages"]))}
    found = []
    for name in names:
        if name in ("chosen", "rejected", "prompt") or (name.lower() not in by_alias and is_metadata(name)):
            continue
        texts = [plain_text(row.get(name)).strip() if writing(row.get(name)) else "" for row in rows]
        if not any(texts) or (name.lower() not in by_alias and not _reads_like_prompts(texts)):
            continue
        repeated = [bool(text) and text in plain_text(part) for text, part in zip(texts, shared, strict=False)]
        if not repeated or not all(repeated):
            found.append(name)
    return sorted(found, key=lambda name: by_alias.get(name.lower(), len(by_alias)))


def _reads_like_prompts(texts: Sequence[str]) -> bool:
    """Texts of several words that differ from row to row, which names of models, topics or languages do not."""
    words = [len(text.split()) if text.isascii() else max(len(text.split()), len(text) // 3) for text in texts]
    return sum(words) >= 3 * len(texts) and 2 * len(set(texts)) > len(texts)


def _ask(candidates: Sequence[str], names: Sequence[str], rows: Sequence[Row]) -> str:
    prompt, *others = candidates
    mapped = {"prompt": prompt}
    for ours in ("input", "system"):
        filled = ours in names and any(plain_text(row.get(ours)).strip() for row in rows)
        if filled and prompt != ours:
            mapped[ours] = ours
    others = [name for name in others if name not in mapped.values()]
    also = f" (or {', '.join(map(repr, others[:5]))})" if others else ""
    arguments = " ".join(shlex.quote(f"{ours}={theirs}") for ours, theirs in mapped.items())
    return (
        f"There is no column 'prompt', but column {prompt!r}{also} looks like it, so no prompt is cut out of 'chosen' "
        f"and 'rejected'. Pass: --columns {arguments}. If 'chosen' and 'rejected' themselves begin with the prompt, "
        f"pass --format {IMPLICIT}. In Python: prefopt.data.normalise(dataset, {mapped})."
    )


def _answers_only(pairs: Sequence[Row], shared: Sequence[Any]) -> str:
    at = min(range(len(pairs)), key=lambda place: len(shared[place]))
    sides = " and ".join(repr(plain_text(pairs[at][side])[:60]) for side in ("chosen", "rejected"))
    return (
        "There is no column 'prompt', and 'chosen' and 'rejected' do not begin with a prompt that differs from row to "
        f"row (the least alike of the first {len(pairs)} rows: {sides}), so they look like answers without their "
        "prompts. Add a column 'prompt', or map it with --columns prompt=NAME. If they do begin with the prompt, pass "
        f"--format {IMPLICIT} (in Python: prefopt.data.normalise(dataset, format={IMPLICIT!r}))."
    )


def check_repeated(rows: Sequence[Row]) -> None:
    """Refuses a plain prompt next to whole conversations that do not contain it: one of the two would be lost.

    Raises:
        DataError: with a row's prompt and the conversation's.
    """
    whole = [
        (row["prompt"], extract_prompt(row["chosen"], row["rejected"])[0])
        for row in rows
        if isinstance(row.get("prompt"), str)
        and isinstance(row.get("chosen"), list)
        and isinstance(row.get("rejected"), list)
        and role(next(iter(row["chosen"]), None)) != "assistant"
    ]
    differing = [(text, shared) for text, shared in whole if not _says(plain_text(shared), text)]
    if 2 * len(differing) > len(whole):
        text, shared = differing[0]
        raise DataError(
            "'chosen' and 'rejected' are whole conversations, and column 'prompt' says something else than they do: "
            f"{text[:80]!r} beside {plain_text(shared)[:80]!r}. To read the conversations alone, pass --columns "
            "unused=prompt; to put the column in front of them as a system message, pass --columns system=prompt."
        )


def _says(shared: str, text: str) -> bool:
    # A prompt may have a template's words around it, or lack the system message.
    left, right = " ".join(shared.split()), " ".join(text.split())
    return right in left or (bool(left) and left in right)


def add_context(dataset: Dataset | IterableDataset, mapped: Sequence[str]) -> Dataset | IterableDataset:
    """Normalised rows with the columns `mapped` (of `CONTEXT`) moved into the prompt and removed."""
    if "input" in mapped:
        feature = dataset.features["prompt"] if dataset.features is not None else None
        dataset = map_rows(dataset, _with_input, {"prompt": feature}, "Appending input", ["input"])
    for name, function in (("history", _with_history), ("system", _with_system)):
        if name in mapped:
            dataset = map_rows(dataset, function, _of_conversations(dataset), f"Adding {name}", [name])
    return dataset


def _of_conversations(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """Types of the texts once they are messages."""
    if dataset.features is None:
        return {"prompt": MESSAGES}
    feature = dataset.features["prompt"]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        return {"prompt": feature}
    return dict.fromkeys((name for name in SPEAKERS if name in dataset.features), MESSAGES)


def _with_input(row: Row) -> dict[str, Any]:
    prompt, text = row["prompt"], row.get("input")
    if not text or (isinstance(text, str) and not text.strip()):
        return {"prompt": prompt}
    if not isinstance(text, str):
        raise DataError(
            f"--columns input=...: a row has no text there but {str(text)[:60]}. If these are earlier turns, pass "
            "--columns history=... instead."
        )
    if isinstance(prompt, str):
        return {"prompt": f"{prompt}\n{text}" if prompt.strip() else text}
    if not prompt or not isinstance(prompt[-1].get("content"), str):
        raise DataError(
            f"--columns input=...: a row's prompt has no text to append {text[:60]!r} to. Take the column out, or "
            "append it to the messages yourself."
        )
    return {"prompt": [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n{text}"}]}


def _with_history(row: Row) -> dict[str, Any]:
    """The row as a conversation that begins with its earlier turns: messages, or pairs of a question and an answer."""
    texts = in_turns(row)
    turns = as_messages(row.get("history")) or []
    if all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns
    ):
        turns = [
            {"role": speaker, "content": text}
            for turn in turns
            for speaker, text in zip(("user", "assistant"), turn, strict=True)
        ]
    if not isinstance(turns, list) or not all(role(turn) for turn in turns):
        raise DataError(
            f"--columns history=...: a row has {str(turns)[:80]} there. It must hold messages, or [question, answer] "
            "pairs."
        )
    return {**texts, "prompt": [*without_nulls(turns), *(texts["prompt"] or [])]}


def _with_system(row: Row) -> dict[str, Any]:
    """The row as a conversation that begins with its system message, if it has one."""
    texts = in_turns(row)
    text = plain_text(row.get("system"))
    if not text.strip():
        return texts
    prompt = texts["prompt"] or []
    if prompt and role(prompt[0]) in ("system", "developer"):
        if plain_text(prompt[0]).strip() != text.strip():
            raise DataError(
                "--columns system=...: a row's conversation has a system message already, "
                f"{plain_text(prompt[0])[:60]!r}, beside {text[:60]!r} of the column. Keep one of them."
            )
        return texts
    return {**texts, "prompt": [{"role": "system", "content": text}, *prompt]}
