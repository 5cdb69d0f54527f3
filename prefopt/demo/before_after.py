"""What the demo shows: greedy answers to held-out prompts before and after training, side by side, and the numbers.

Next to the rate of the rule are the numbers that reveal an over-optimised run: empty and one-word answers, and how far
the log-ratios of chosen and rejected answers moved. Nothing here trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from prefopt.demo.rule import RULE, follows_rule
from prefopt.generation.answers import Answer, Prompt
from prefopt.safety.errors import UsageError
from prefopt.safety.tables import table
from prefopt.trainer.metrics import still_reference


@dataclass(frozen=True)
class AnswerSummary:
    """Shares (0 to 1) over a set of answers, and their mean length; unfinished answers count with their length so
    far."""

    rule_rate: float
    unfinished: float
    empty: float
    one_word: float
    mean_words: float


@dataclass(frozen=True)
class PairMetrics:
    """Held-out preference numbers. The ratios are log pi(y|x) - log ref(y|x), summed over an answer, in nats.

    `is_reference`: the policy is the reference up to rounding, so that its accuracy counts ties as wrong.
    """

    loss: float
    accuracy: float
    margin: float
    chosen_ratio: float | None = None
    rejected_ratio: float | None = None
    is_reference: bool = False

    @classmethod
    def from_logs(cls, logs: Mapping[str, float], prefix: str = "eval_") -> PairMetrics | None:
        """Read what `PreferenceTrainer.evaluate` returns; None where the objective defines no rewards (plain sft)."""
        if f"{prefix}rewards/accuracies" not in logs:
            return None
        return cls(
            loss=logs[prefix + "loss"],
            accuracy=logs[prefix + "rewards/accuracies"],
            margin=logs[prefix + "rewards/margins"],
            chosen_ratio=logs.get(f"{prefix}ratios/chosen"),
            rejected_ratio=logs.get(f"{prefix}ratios/rejected"),
            is_reference=still_reference({name.removeprefix(prefix): value for name, value in logs.items()}),
        )


# ------------------------------------------------------------------------------------------------------- measuring


def follows(answer: Answer) -> bool:
    """Whether an answer follows the rule. An unfinished one never does."""
    return answer.ended and follows_rule(answer.text)


def rule_rate(answers: Sequence[Answer]) -> float:
    """Share of answers that are finished and follow the rule."""
    return _share([follows(answer) for answer in answers])


def summarize(answers: Sequence[Answer]) -> AnswerSummary:
    """The rate of the rule, with signs of a collapse: empty, one-word and unfinished answers."""
    words = [len(answer.text.split()) for answer in answers]
    return AnswerSummary(
        rule_rate=rule_rate(answers),
        unfinished=_share([not answer.ended for answer in answers]),
        empty=_share([count == 0 for count in words]),
        one_word=_share([count == 1 for count in words]),
        mean_words=sum(words) / len(words) if words else 0.0,
    )


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


# --------------------------------------------------------------------------------------------------------- showing


def side_by_side(
    prompts: Sequence[Prompt],
    before: Sequence[Answer],
    after: Sequence[Answer],
    before_metrics: PairMetrics | None = None,
    after_metrics: PairMetrics | None = None,
    shown: int | None = 12,
) -> RenderableType:
    """The table of answers (the first `shown`; None for all) over a panel of the numbers, for `Console.print`."""
    if not len(prompts) == len(before) == len(after):
        raise UsageError(
            f"{len(prompts)} prompts, {len(before)} answers before and {len(after)} after: counts differ."
        )
    limit = len(prompts) if shown is None else min(shown, len(prompts))
    title = f"Greedy answers to {limit} of {len(prompts)} held-out prompts"
    made = table("Prompt", "Before", "After", title=title, show_lines=True, expand=True)
    for column, ratio in zip(made.columns, (2, 4, 4), strict=True):
        column.ratio = ratio
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:limit]:
        made.add_row(Text(_question(prompt)), _answer_cell(old), _answer_cell(new))
    return Group(made, summary_panel(before, after, before_metrics, after_metrics))


def summary_panel(
    before: Sequence[Answer],
    after: Sequence[Answer],
    before_metrics: PairMetrics | None = None,
    after_metrics: PairMetrics | None = None,
) -> Panel:
    """The numbers before and after, and a warning if answers are empty."""
    grid = Table.grid(padding=(0, 3))
    grid.add_column()
    grid.add_column(justify="right")
    grid.add_column(justify="right")
    grid.add_row("", Text("before", style="bold"), Text("after", style="bold"))
    old, new = summarize(before), summarize(after)
    if before_metrics is not None and after_metrics is not None:
        for name, values in _pair_rows(before_metrics, after_metrics):
            grid.add_row(name, *values)
    for name, attribute in (
        (f"rule holds ({RULE})", "rule_rate"),
        ("unfinished answers", "unfinished"),
        ("empty answers", "empty"),
        ("one-word answers", "one_word"),
    ):
        grid.add_row(name, f"{getattr(old, attribute):.0%}", f"{getattr(new, attribute):.0%}")
    grid.add_row("mean words in an answer", f"{old.mean_words:.1f}", f"{new.mean_words:.1f}")
    warnings = [Text("! " + line, style="bold red") for line in broken_answers(new)]
    return Panel(Group(grid, *warnings), title=f"{len(after)} held-out prompts", expand=False)


def broken_answers(after: AnswerSummary) -> list[str]:
    """A warning about answers that say nothing; empty for a healthy run."""
    if not (after.empty or after.one_word):
        return []
    return [
        f"{after.empty + after.one_word:.0%} of the answers are empty or one word. Lower the learning rate or the "
        "number of steps, and check that rejected answers have their end token."
    ]


def _pair_rows(old: PairMetrics, new: PairMetrics) -> list[tuple[str, tuple[str, str]]]:
    ties = " (policy = reference)" if old.is_reference else ""
    rows = [
        ("reward accuracy", (f"{old.accuracy:.0%}{ties}", f"{new.accuracy:.0%}")),
        ("reward margin", (f"{old.margin:.2f}", f"{new.margin:.2f}")),
        ("loss", (f"{old.loss:.3f}", f"{new.loss:.3f}")),
    ]
    for name, a, b in (
        ("log-ratio of chosen, nats", old.chosen_ratio, new.chosen_ratio),
        ("log-ratio of rejected, nats", old.rejected_ratio, new.rejected_ratio),
    ):
        if a is not None and b is not None:
            rows.append((name, (f"{a:+.1f}", f"{b:+.1f}")))
    return rows


def _question(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _answer_cell(answer: Answer) -> Text:
    mark = Text("\u2713 ", style="bold green") if follows(answer) else Text("\u2717 ", style="bold red")
    if not answer.text:
        return mark + Text("(empty)", style="dim")
    return mark + Text(answer.text + ("" if answer.ended else " \u2026"))
