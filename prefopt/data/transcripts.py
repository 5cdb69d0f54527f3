r"""Human/Assistant transcripts, the format of Anthropic's HH sets, turned into messages.

A transcript is one string `\n\nHuman: ...\n\nAssistant: ...`. Nothing here knows of datasets or columns; a text that
is no transcript gives None, and the caller decides what becomes of the row.
"""

from __future__ import annotations

import re

Message = dict[str, str]

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_OPENING = re.compile(r"\A\s*(?:Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def looks_like_transcript(text: object) -> bool:
    """Whether a value is a string that opens with a speaker and has an assistant's turn somewhere."""
    return isinstance(text, str) and bool(_OPENING.match(text)) and "Assistant:" in text


def parse_transcript(text: object) -> list[Message] | None:
    """The turns of a transcript, or None where it has no speakers or does not end with the assistant.

    A speaker named twice in a row (it happens in the published data) makes one message, the parts a blank line
    apart, because many chat templates refuse two messages of one role in a row.
    """
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
    return messages if messages[-1]["role"] == "assistant" else None


def split_transcripts(chosen: object, rejected: object) -> tuple[list[Message], list[Message], list[Message]] | None:
    """Prompt and the two completions of a transcript pair, or None where they do not make a pair.

    The turns that both share are the prompt. Where the two already differ before their last turns, the completion
    is everything from the first assistant turn that differs. Two that first differ in what the *human* says have no
    common prompt: None.
    """
    left, right = parse_transcript(chosen), parse_transcript(rejected)
    if left is None or right is None:
        return None
    # At least the last turn belongs to the completion, also where both are equal (validation reports that).
    most = min(len(left), len(right)) - 1
    shared = 0
    while shared < most and left[shared] == right[shared]:
        shared += 1
    if left[shared]["role"] != "assistant" or right[shared]["role"] != "assistant":
        return None
    return left[:shared], left[shared:], right[shared:]
