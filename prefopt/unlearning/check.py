"""What is wrong with sets to forget and to retain, before training: `prefopt check FORGET --retain RETAIN`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.unlearning.data import Question, repeated_rows, shared_rows


@dataclass(frozen=True)
class Finding:
    """One problem of a set.

    Attributes:
        rows: that have it, from 0.
        text: what is wrong, and what to do.
        fatal: whether a run would refuse the sets.
    """

    rows: tuple[int, ...]
    text: str
    fatal: bool = False


def check_set(rows: Sequence[Question]) -> list[Finding]:
    """What is wrong with one set: duplicates, wrong answers that are missing or true, a mixture of kinds."""
    every = range(len(rows))
    texts = tuple(number for number in every if not rows[number].question)
    lacking = tuple(number for number in every if not rows[number].wrong)
    counts = sorted({len(row.wrong) for row in rows if row.wrong})
    true = tuple(n for n in every if {rows[n].answer, rows[n].paraphrase} & set(rows[n].wrong))
    findings = [
        Finding(repeated_rows(rows), "were there before: a set should hold each question once"),
        Finding(
            texts if len(texts) < len(rows) else (),
            "are plain texts among questions: both kinds cannot be mixed, take them apart",
            fatal=True,
        ),
        Finding(
            () if len(texts) == len(rows) else lacking,
            "have no perturbed_answer: no truth ratio, so no forget quality and no model utility without them",
        ),
        Finding(true, "have a perturbed_answer that is the answer or its paraphrase: replace it by a wrong one"),
        Finding(
            tuple(n for n in every if rows[n].wrong and len(rows[n].wrong) != counts[-1]),
            "have fewer perturbed answers than others: truth ratios need equally many in each row",
        ),
    ]
    return [finding for finding in findings if finding.rows]


def check_both(forget: Sequence[Question], retain: Sequence[Question]) -> list[Finding]:
    """What is wrong between the two sets: rows that are in both, questions against plain texts."""
    findings = [
        Finding(
            tuple(number for number, _ in shared_rows(forget, retain)),
            "of the forget set are in the retain set too: take them out of one of the two",
            fatal=True,
        )
    ]
    if bool(forget[0].question) != bool(retain[0].question):
        findings.append(
            Finding((0,), "of one set is a question and of the other a plain text: both need one kind", fatal=True)
        )
    return [finding for finding in findings if finding.rows]
