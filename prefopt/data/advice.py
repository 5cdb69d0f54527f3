"""Messages for missing columns: the columns that exist, and the option or command that helps."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.columns import ALIASES, OURS, listed
from prefopt.data.formats import format_advice
from prefopt.data.messages import plain_text, writing
from prefopt.data.paths import fields_of, value_at
from prefopt.data.ranking_advice import pairing_advice
from prefopt.safety.errors import did_you_mean

_SIDES = {
    "chosen": {"chosen", "preferred", "better", "best", "good", "accepted", "positive", "win", "winner", "winning"},
    "rejected": {"rejected", "dispreferred", "worse", "worst", "bad", "negative", "lose", "loser", "losing"},
}
"""Words in longer names (`good_answer`, `chosen_conversations`) that tell the side."""
_NOT = {"non", "not", "un", "less"}


def missing_columns_message(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]] = (), unlabelled: bool = False
) -> str:
    """What is missing, what exists, and the `--columns` that fixes it, if one does.

    Args:
        names: the dataset's columns.
        rows: its first rows; columns with unsuitable values are not suggested.
        unlabelled: one answer without a label is enough.
    """
    start = f"These columns are not a preference data set: {listed(names)}. "
    if advice := pairing_advice(names, rows) or format_advice(names, rows, unlabelled):
        return start + advice
    found = _found(names, rows)
    candidates = (("chosen", "rejected"), ("prompt", "completion", "label"), ("messages", "label"))

    def reach(columns: tuple[str, ...]) -> float:
        return sum(found[wanted] is not None for wanted in columns) / len(columns)

    nearest = max(candidates, key=reach)
    needed = (
        "Needed: prompt, chosen, rejected (prompt may be left out where chosen and rejected hold whole "
        "conversations); or prompt, completion, label; or messages, label. "
    )
    if unlabelled:
        needed += "This objective also takes prompt, completion and messages without a label. "
    if reach(nearest) == 0:
        return (
            f"{start}{needed}None of them looks like a needed one. Map them with --columns prompt=... chosen=... "
            "rejected=..."
        )
    mapped = ("prompt", *nearest) if nearest[0] == "chosen" else nearest
    lacking = [wanted for wanted in nearest if found[wanted] is None]
    if not lacking or (unlabelled and lacking == ["label"]):
        mapped = tuple(ours for ours in mapped if found[ours] is not None)
        return f"{start}{needed}If that is what they mean, pass: --columns {_arguments(found, mapped)}."
    if lacking == ["label"]:
        return f"{start}{needed}{_without_label(names, rows, found, nearest)}"
    if lacking == ["completion", "label"]:
        prompt = f"{_arguments(found, ('prompt',))} ".lstrip()
        return (
            f"{start}{needed}{found['prompt']!r} looks like the prompt, but no column looks like the answers. Map "
            f"them: --columns {prompt}chosen=NAME rejected=NAME."
        )
    return (
        f"{start}{needed}No column looks like {' or '.join(lacking)}; add it, or map it with --columns "
        f"{lacking[0]}=NAME if it has another name, or choose a set that holds preferences."
    )


def _found(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """The column, or the field of one, for each of our names."""
    fields = list(dict.fromkeys(path for row in rows for path in fields_of(row)))
    texts = [name for name in (*names, *fields) if not rows or any(writing(value_at(row, name)) for row in rows)]
    places = [[name for name in texts if name in names], [path for path in texts if path not in names]]
    found: dict[str, str | None] = {}
    for wanted in ("chosen", "rejected", "prompt", "completion", "messages"):
        found[wanted] = next((name for place in places if (name := _find(wanted, place))), None)
    found["label"] = _find("label", [name for name in names if _may_be_label(name, rows)])
    for side in ("chosen", "rejected"):
        of_side = [name for name in texts if _side(name) == side]
        found[side] = found[side] or max(of_side, key=lambda name: _length(name, rows), default=None)
    if found["rejected"] and not found["chosen"]:
        found["chosen"] = found["completion"]
    if found["rejected"] and not found["prompt"] and found["messages"] not in (found["chosen"], found["rejected"]):
        found["prompt"] = found["messages"]
    return found


def _side(name: str) -> str | None:
    """The side that the words of a name mean; `non_preferred_output` is the rejected one."""
    words = {word.lower() for word in re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", name)}
    sides = [side for side, telling in _SIDES.items() if words & telling]
    if sides == ["chosen"] and words & _NOT:
        return "rejected"
    return sides[0] if len(sides) == 1 else None


def _length(name: str, rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(plain_text(value_at(row, name))) for row in rows)


def _arguments(found: Mapping[str, str | None], mapped: Sequence[str]) -> str:
    """Words of `--columns`, quoted for a shell."""
    told = [(ours, found[ours]) for ours in mapped if found[ours] not in (None, ours)]
    return " ".join(shlex.quote(f"{ours}={str(theirs)[:60]}") for ours, theirs in told)


def _without_label(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]], found: Mapping[str, str | None], nearest: Sequence[str]
) -> str:
    texts = [found[wanted] for wanted in nearest if wanted != "label"]
    verdicts = [name for name in names if rows and all(isinstance(row.get(name), bool) for row in rows)]
    if verdicts:
        arguments = _arguments({**found, "label": verdicts[0]}, nearest)
        return f"If true in {verdicts[0]!r} means a desirable completion, pass: --columns {arguments}."
    return (
        f"{' and '.join(map(repr, texts))} look like a conversation, but no column looks like "
        "label, and there is no second answer to prefer it to: without labels and pairs this is data for "
        "supervised fine-tuning. Train on it with --loss sft, or add label (true or false), or chosen and rejected, "
        "or choose a set that holds preferences."
    )


def _may_be_label(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """At most two values; a rating or a text has more."""
    values = [row.get(name) for row in rows]
    simple = all(value is None or isinstance(value, str | int | float) for value in values)
    return simple and len({str(value) for value in values if value is not None}) <= 2


def _find(wanted: str, names: Sequence[str]) -> str | None:
    """The column for `wanted`: itself, a known alias, or a near spelling."""
    if wanted in names:
        return wanted
    by_lower = {name.rpartition(".")[2].lower(): name for name in reversed(names)}
    for alias in (wanted, *ALIASES[wanted]):
        if alias in by_lower:
            return by_lower[alias]
    # A spelling slip (`promt`, `Rejected_`); `reject` must not match `prompt`, so the other names are excluded.
    spellings = [name for name in names if name not in OURS and not name.lower().endswith(("_id", "_ids"))]
    hint = did_you_mean(wanted, spellings, limit=1)
    return next((name for name in spellings if repr(name) in hint), None)
