"""What `prefopt select-kernel` prints."""

from __future__ import annotations

import math
import shlex

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prefopt.analysis.kernel_choice.choose import GIVEN, HIDDEN, Choice
from prefopt.analysis.kernel_choice.measures import SLACK
from prefopt.analysis.kernel_choice.trial import STEPS, Outcome, Trial
from prefopt.safety.tables import table

_MEANINGS = {
    "pnd": ("PND", "distance between chosen and rejected, mean"),
    "pad": ("positive distance", "distance of the chosen to its prompt, mean"),
    "nad": ("negative distance", "distance of the rejected to its prompt, mean"),
    "pnav": ("PNAV", "variance of the difference of the two"),
    "tat": ("TAT", f"mean of max(0, that difference + {SLACK:g}); 0 is tight"),
    "nag": ("NAG", "the difference over the sum, mean; above 0 the chosen is closer"),
    "overlap": ("support overlap", "mass that the two distributions share, 0 to 1"),
    "drift": ("drift", "distance of their means, in standard deviations"),
    "kurtosis": ("kurtosis", "excess; 0 of a normal distribution"),
    "roughness": ("roughness", "of their histograms; 1 of a normal sample"),
}


def explain(choice: Choice, source: str) -> Group:
    """All results, for the terminal."""
    how = {HIDDEN: "the model's mean hidden states", GIVEN: "the data's columns"}.get(
        choice.embeddings, f"embeddings by {choice.embeddings}"
    )
    of = f" of {choice.usable}" if choice.measures.rows < choice.usable else ""
    parts: list[RenderableType] = [Text(f"{source}: {choice.measures.rows}{of} pairs, {how}", style="bold")]
    parts += [_measures(choice), _selection(choice)]
    if choice.trial is not None and choice.outcome is not None:
        parts += [_ranking(choice.trial, choice.outcome), _verdict(choice.trial, choice.outcome)]
    return Group(*parts)


def command(choice: Choice) -> str:
    """The options that train the selected pair, in one line, to copy."""
    option = "" if choice.embeddings in (HIDDEN, GIVEN) else f" --embeddings {shlex.quote(choice.embeddings)}"
    return f'train with  --loss "{choice.loss}"{option}'


def _measures(choice: Choice) -> Table:
    made = table("measure", "value", "what it is", right=("value",))
    values = choice.measures.as_dict()
    for key, (name, meaning) in _MEANINGS.items():
        error = f" ± {values['nag_error']:.3f}" if key == "nag" else ""
        made.add_row(name, f"{values[key]:.3f}{error}", meaning)
    return made


def _selection(choice: Choice) -> Group:
    selected = choice.selection
    reasons = Table.grid("", "", padding=(0, 2, 0, 0))
    for what, name, reason in (
        ("kernel", selected.kernel, selected.kernel_reason),
        ("divergence", selected.divergence, selected.divergence_reason),
    ):
        reasons.add_row(Text(what, style="cyan"), Text(name, style="bold").append(f": {reason}", style="not bold"))
    if selected.doubt:
        reasons.add_row(Text("but", style="yellow"), Text(selected.doubt))
    note = "Names of the measures are the paper's; formulas, thresholds and order are our reading.\n"
    return Group("", reasons, Text(note, style="dim"))


def _ranking(trial: Trial, selected: Outcome) -> Table:
    title = f"{len(trial.outcomes)} pairs, each trained {len(selected.losses)} times {STEPS} steps on cached states"
    numbers = ("held-out loss", "accuracy", "KL")
    made = table("rank", "kernel", "divergence", *numbers, right=numbers, title=title, title_justify="left")
    rows = sorted([*trial.outcomes, trial.baseline], key=lambda found: found.loss)
    for found in rows:
        plain = found is trial.baseline
        rank = "" if plain else str(trial.rank(found))
        style = "bold" if found is selected else "dim" if plain else None
        name = found.divergence or "for comparison"
        made.add_row(
            rank, found.kernel, name, f"{found.loss:.4f}", f"{found.accuracy:.3f}", f"{found.kl:.4f}", style=style
        )
    return made


def _verdict(trial: Trial, selected: Outcome) -> Text:
    """The rank of the selected pair in words, and whether it is significant."""
    best, last, count = trial.outcomes[0], trial.outcomes[-1], len(trial.outcomes)
    text = Text(f"The selected pair ranks {trial.rank(selected)} of {count} by held-out loss ({selected.loss:.4f}; ")
    text.append(f"best {best.loss:.4f}, last {last.loss:.4f}) and {trial.accuracy_rank(selected)} by accuracy")
    text.append(f" ({selected.accuracy:.3f} of {trial.held_out} pairs, {len(selected.losses)} draws).")
    for other, name in ((best, "the best pair"), (trial.baseline, "plain dpo")):
        if other is not selected:
            gap, error = trial.gap(selected, other)
            told = "" if trial.tells(selected, other) else ", not significant with these draws"
            text.append(f" Loss against {name}: {gap:+.4f} ± {error:.4f}{told}.")
    if min(best.loss, trial.baseline.loss) > math.log(2):
        text.append(
            f"\nNone did better than no training at all (log 2 = {math.log(2):.4f}): {trial.trained_on} pairs and "
            f"{STEPS} steps teach nothing that holds for other pairs of this set, so the order means little."
        )
    text.append(
        "\nKL is from the reference, in nats a token: a pair with a weaker penalty moves farther, which explains part "
        "of a lower loss. What was trained is a low-rank change of the last hidden states, over tokens that "
        f"hold {1 - trial.left_out:.1%} of the model's probability, not the model: take the order as a hint."
    )
    return text
