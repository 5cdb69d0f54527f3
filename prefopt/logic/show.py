"""What `prefopt logic` prints about a structure: formula, truth table, closed form, and its place in the order."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from prefopt.logic.decompile import Decompiled
from prefopt.logic.structure import NAMED, Structure, name_of, named
from prefopt.safety.tables import table


def explain(found: Decompiled, title: str) -> Group:
    """Everything known about a loss's structure, for the terminal."""
    structure = found.structure
    lines = Text(f"{title}\n", style="bold")
    for label, text in _facts(found):
        lines.append(f"  {label:<11}", style="not bold cyan").append(f"{text}\n", style="not bold")
    return Group(lines, _truth_table(structure), Text(_place(structure)))


def _facts(found: Decompiled) -> list[tuple[str, str]]:
    structure = found.structure
    facts = [("named", name_of(structure) or "no name in the paper"), ("core", structure.core)]
    facts += [("given", structure.given or "anything"), ("also", structure.also or "nothing")]
    if any("&" in part for part in structure.over.split(",")):
        parts = structure.over.split(", ")
        pairs = zip(structure.names, parts, strict=True)
        facts.append(("where", ", ".join(f"{name} stands for {part.replace('&', ' and ')}" for name, part in pairs)))
    remark = NAMED.get(name_of(structure), ("", "", "", ""))[3]
    if remark:
        facts.append(("certainty", remark))
    per_token = "per token" if found.average else "of whole completions"
    facts += [("odds", f"{structure.odds}, probabilities {per_token}"), ("loss", _closed_form(found))]
    facts.append(("expression", str(found.loss())))
    return facts


def _closed_form(found: Decompiled) -> str:
    odds = "log odds" if found.beta == 1 else f"{found.beta:g} * log odds"
    shift = "" if found.gamma == 0 else f" {'-' if found.gamma > 0 else '+'} {abs(found.gamma):g}"
    link = {
        "logistic": f"-log sigmoid({odds}{shift})",
        "hinge": f"relu(1 - ({odds}{shift}))",
        "squared": f"(log odds - {1 / (2 * found.beta) + found.gamma:g})^2",
    }[found.link]
    return link if found.scale == 1 else f"{found.scale:g} * {link}"


def _truth_table(structure: Structure) -> Table:
    made = table(*structure.names, "counts for", title="Truth table", title_justify="left")
    for column in made.columns[:-1]:
        column.justify = "center"
    true, false = structure.rows
    for row in reversed(range(1 << structure.count)):
        sides = [side for side, rows in (("T", true), ("B", false)) if rows >> row & 1]
        what = {(): "neither: ruled out", ("T",): "true side", ("B",): "false side"}.get(tuple(sides), "both sides")
        made.add_row(*f"{row:0{structure.count}b}", what)
    return made


def _place(structure: Structure) -> str:
    """The named structures above and below, if names exist for these propositions."""
    if structure.count != 2:
        return ""
    plain = Structure(structure.T, structure.B)
    asks = [name for name in NAMED if named(name) != plain and plain.at_least_as_demanding_as(named(name))]
    asked = [name for name in NAMED if named(name) != plain and named(name).at_least_as_demanding_as(plain)]
    return (
        f"Loss never below that of: {', '.join(asks) or 'none of the named ones'}\n"
        f"Loss never above that of: {', '.join(asked) or 'none of the named ones'}"
    )
