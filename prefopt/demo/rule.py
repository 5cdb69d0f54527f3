"""The demo's visible rule: answer in one sentence of at most 22 words, without a preamble.

The rule needs only the text and no model, so a person can check any line of the report by eye. The data, the report
and the tests use this definition. The report checks whether an answer was finished.
"""

from __future__ import annotations

import re

MAX_WORDS = 22

RULE = f"one sentence, at most {MAX_WORDS} words, no preamble"

# Openers that delay the answer. Matched at the start, in any case, as whole words.
PREAMBLES = (
    "sure",
    "certainly",
    "of course",
    "absolutely",
    "definitely",
    "okay",
    "ok",
    "well",
    "alright",
    "hello",
    "hi",
    "here is",
    "here are",
    "here's",
    "great question",
    "good question",
    "excellent question",
    "what a",
    "that's a",
    "that is a",
    "thank you",
    "thanks",
    "i'd be",
    "i would be",
    "i'm happy",
    "i'm glad",
    "i can help",
    "i'll help",
    "as an ai",
    "let me",
    "let's",
    "to answer",
)
_PREAMBLE = re.compile(rf"(?:{'|'.join(map(re.escape, PREAMBLES))})\b", re.IGNORECASE)

# A full stop after a title does not end a sentence; after the others it does if a capital letter follows.
_TITLE = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|St|vs|approx|e\.g|i\.e)\.$")
_SHORT_FORM = re.compile(r"(?:\b(?:etc|a\.m|p\.m)|\.[A-Z])\.$")
_END = re.compile(r"[.!?]+[\"')\]\u201d\u2019]*(?=\s|$)")
_FINISHED = re.compile(r"[.!?][\"')\]\u201d\u2019]*$")


def sentences(text: str) -> list[str]:
    """Split into sentences. A line break ends one too, so that headings and list items count."""
    found: list[str] = []
    for line in text.splitlines():
        start = 0
        for end in _END.finditer(line):
            head, rest = line[: end.start() + 1], line[end.end() :].lstrip()
            if rest and (_TITLE.search(head) or (_SHORT_FORM.search(head) and rest[0].islower())):
                continue
            found.append(line[start : end.end()].strip())
            start = end.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if sentence]


def explain(answer: str) -> list[str]:
    """Why the answer does not follow the rule, in words; empty if it does."""
    text = answer.strip().replace("\u2019", "'")
    if not text:
        return ["it is empty"]
    problems = []
    if (count := len(sentences(text))) != 1:
        problems.append(f"{count} sentences instead of one")
    if (words := len(text.split())) > MAX_WORDS:
        problems.append(f"{words} words, more than {MAX_WORDS}")
    if opener := _PREAMBLE.match(text):
        problems.append(f'it opens with "{opener.group()}"')
    if not _FINISHED.search(text):
        problems.append("no full stop, question mark or exclamation mark at its end")
    return problems


def follows_rule(answer: str) -> bool:
    """True for one sentence of at most 22 words that ends in sentence punctuation and has no preamble."""
    return not explain(answer)
