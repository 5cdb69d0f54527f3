r"""Human/Assistant transcripts, the format of Anthropic's HH sets, turned into messages.

A transcript is one string `\n\nHuman: ...\n\nAssistant: ...`. Nothing here knows of datasets; a pair that cannot be
read is marked, and validation reports it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.errors import DataError
from prefopt.data.messages import plain_text
from prefopt.data.prompts import check_implicit, shared_length

Message = dict[str, str]
Row = Mapping[str, Any]

UNPARSED = "unparsed transcript"
"""The role of the whole text of an unparsed transcript, so that reports can show it."""

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_OPENING = re.compile(r"\A\s*(?:Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def looks_like_transcript(text: object) -> bool:
    """Whether a value is a string that opens with a speaker and has an assistant's turn somewhere."""
    return isinstance(text, str) and bool(_OPENING.match(text)) and "Assistant:" in text


def parse_transcript(text: object) -> list[Message] | None:
    """The turns of a transcript, or None if it has no speakers or does not end with the assistant.

    A speaker named twice in a row (it happens in the published data) makes one message, with a blank line between the
    parts, because many chat templates refuse two messages of one role in a row.
    """
    messages = _turns(text)
    return messages if messages and messages[-1]["role"] == "assistant" else None


def parse_prompt(text: object) -> list[Message] | None:
    """The turns of a transcript's beginning, without the empty turn of the assistant that asks for the answer."""
    messages = _turns(text)
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def _turns(text: object) -> list[Message] | None:
    if not isinstance(text, str) or not _OPENING.match(text):
        return None
    pieces = _SPEAKER.split(text)
    messages: list[Message] = []
    for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = "\n\n".join(part for part in (messages[-1]["content"], content) if part)
        else:
            messages.append({"role": role, "content": content})
    return messages


def split_transcripts(chosen: object, rejected: object) -> tuple[list[Message], list[Message], list[Message]] | None:
    """Prompt and the two completions of a transcript pair, or None if they do not make a pair.

    The turns that both share are the prompt. Where the two already differ before their last turns, the completion
    is everything from the first assistant turn that differs. Two that first differ in what the *human* says have no
    common prompt: None.
    """
    left, right = parse_transcript(chosen), parse_transcript(rejected)
    if left is None or right is None:
        return None
    # At least the last turn belongs to the completion, also where both are equal (validation reports that).
    most = min(len(left), len(right)) - 1
    shared = shared_length(left, right, most)
    if left[shared]["role"] != "assistant" or right[shared]["role"] != "assistant":
        return None
    return left[:shared], left[shared:], right[shared:]


def check_transcripts(names: Sequence[str], rows: Sequence[Row]) -> None:
    """Refuses transcripts without a prompt, or with a column that contradicts it.

    Raises:
        DataError: naming a row, or the column that looks like the prompt.
    """
    read = [(row, split_transcripts(row.get("chosen"), row.get("rejected"))) for row in rows]
    pairs = [(row, parts[0]) for row, parts in read if parts is not None]
    if "prompt" not in names:
        if 2 * sum(not prompt for _, prompt in pairs) > len(pairs):
            check_implicit(names, rows)
        return
    differing = [row for row, prompt in pairs if prompt and not _repeats(prompt, row.get("prompt"))]
    if 2 * len(differing) > len(pairs):
        raise DataError(
            "'chosen' and 'rejected' are transcripts with their own prompt, and column 'prompt' says something else: "
            f"{plain_text(differing[0]['prompt'])[:80]!r} beside {str(differing[0]['chosen'])[:80]!r}. To read the "
            "transcripts alone, pass --columns unused=prompt; otherwise write one conversation a column."
        )


def from_transcripts(row: Row) -> dict[str, Any]:
    """The row of a transcript pair as messages; its prompt is at the start of both, or in a column."""
    parts = split_transcripts(row["chosen"], row["rejected"])
    given = row.get("prompt")
    if parts is None or (parts[0] and not _repeats(parts[0], given)):
        unread = [[{"role": UNPARSED, "content": row[side]}] for side in ("chosen", "rejected")]
        return {"prompt": [], "chosen": unread[0], "rejected": unread[1]}
    prompt, chosen, rejected = parts
    return {"prompt": prompt or _prompt_messages(given), "chosen": chosen, "rejected": rejected}


def _prompt_messages(given: Any) -> list[Any]:
    """A prompt column as messages: a transcript's beginning, messages, or what the user says."""
    if isinstance(given, list):
        return given
    turns = parse_prompt(given)
    return turns if turns is not None else [{"role": "user", "content": given}] if isinstance(given, str) else []


def _repeats(prompt: Sequence[Message], given: Any) -> bool:
    """Whether a transcript's prompt contains the whole prompt column."""
    said = plain_text(list(prompt))
    return all(plain_text(message).strip() in said for message in _prompt_messages(given))
