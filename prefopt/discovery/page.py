"""The page of a search: what it proposed and refused, its frontier, and the held-out comparison.

Markdown, JSON with every number, and a picture where matplotlib (the `plot` extra) is installed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt.discovery.archive import Archive, Candidate, Result
from prefopt.discovery.evolve import Member
from prefopt.discovery.grammar import Node
from prefopt.discovery.held_out import HeldOut, compare
from prefopt.discovery.levels import TOY
from prefopt.discovery.ranking import KL_BUDGETS, Point, Score, frontier, scores
from prefopt.discovery.read import read
from prefopt.discovery.search import LRML, SEEDS
from prefopt.evaluation.intervals import Interval
from prefopt.safety.files import write_text

MARKDOWN, JSON, PICTURE = "frontier.md", "frontier.json", "frontier.png"
SHOWN = 5
"""Candidates on the page, best first."""


@dataclass(frozen=True)
class Frontier:
    """What a page tells.

    Attributes:
        rows: of the archive.
        settings: of the search.
        best: candidates, best first, with their scores on the toy.
        points: of the population, that no other one dominates.
        held_out: of the best candidates, DPO, hinge, IPO and LRML.
        later: what levels above the toy gave.
    """

    rows: Sequence[Candidate]
    settings: Mapping[str, Any]
    best: Mapping[int, Score]
    points: Sequence[tuple[int, Point]]
    held_out: Sequence[HeldOut]
    later: Sequence[Result]


def measure_frontier(archive: Archive, members: Sequence[Member], later: Sequence[str] = ()) -> Frontier:
    """Compare the best of a population on held-out problems.

    Args:
        archive: of the search.
        members: its population, best first.
        later: levels above the toy.
    """
    rows = archive.candidates()
    population = {member.number: member.node for member in members}
    scored = scores([result for result in archive.results(TOY.name) if result.candidate in population])
    best = [number for number in population if rows[number].generation][:SHOWN]
    known = {"dpo": read(SEEDS["dpo"]), "hinge": read(SEEDS["hinge"]), "ipo": read(SEEDS["ipo"]), "lrml": read(LRML)}
    losses: dict[str, Node] = {**known, **{f"candidate {n}": population[n] for n in best}}
    results = [result for level in later for result in archive.results(level)]
    return Frontier(
        archive.candidates(),
        archive.settings(),
        {n: scored[n] for n in best},
        frontier(scored),
        compare(losses),
        results,
    )


def write_page(told: Frontier, folder: Path) -> list[Path]:
    """Write the files into a folder; returns those that were written."""
    write_text(folder / MARKDOWN, markdown(told))
    write_text(folder / JSON, json.dumps(as_json(told), indent=1) + "\n")
    written = [folder / MARKDOWN, folder / JSON]
    try:
        _draw(told, folder / PICTURE)
    except ImportError:
        return written
    return [*written, folder / PICTURE]


def verdict(held_out: Sequence[HeldOut]) -> str:
    """Whether the search's first candidate beats DPO, in one sentence.

    Only the first one is asked: the best of many on the held-out problems would be chosen by chance.
    """
    first = next((row.name for row in held_out if row.name.startswith("candidate")), None)
    if first is None:
        return "No candidate beside the seeds was trained on the toy: give the search more time or candidates."
    wins = [row.level.name for row in held_out if row.name == first and row.beats_dpo]
    kinds = [row.level.name for row in held_out if row.name == first]
    if wins == kinds:
        return f"The search's first, {first}, beats DPO on {' and on '.join(wins)}."
    if wins:
        return f"The search's first, {first}, beats DPO on {' and on '.join(wins)} only: it is not said to beat DPO."
    return f"The search's first, {first}, does not beat DPO, so no candidate is said to beat it."


def as_json(told: Frontier) -> dict[str, Any]:
    return {
        "settings": dict(told.settings),
        "candidates": len(told.rows),
        "seconds": sum(row.seconds for row in told.rows),
        "refused": dict(_reasons(told.rows)),
        "best": [{"candidate": number, **asdict(score)} for number, score in told.best.items()],
        "frontier": [{"candidate": number, **asdict(point)} for number, point in told.points],
        "verdict": verdict(told.held_out),
        "held_out": [{**asdict(row), "rows": row.rows.tolist(), "beats_dpo": row.beats_dpo} for row in told.held_out],
        "later": [asdict(result) for result in told.later],
    }


def markdown(told: Frontier) -> str:
    """The page."""
    seconds, most = sum(row.seconds for row in told.rows), float(told.settings.get("seconds", 0.0))
    trained = sum(row.level not in ("text", "static") for row in told.rows)
    lines = [
        "# A search for losses",
        "",
        f"{len(told.rows)} candidates in {most / 60:.1f} minutes ({seconds / 60:.1f} of processor time), {trained} of "
        f"them trained. Started from {', '.join(told.settings.get('seeds', []))}; seed {told.settings.get('seed')}.",
        "",
        verdict(told.held_out),
        "",
        "## What was refused",
        "",
        *_table(("reason", "candidates"), [(why, str(count)) for why, count in _reasons(told.rows).most_common()]),
        "",
        "## Best candidates",
        "",
        "On the problems of the search: by Pareto layer of the first three columns, then by the first.",
        "",
        *_table(
            ("candidate", "value, worst beta", "reward at equal KL", "length at equal KL", "expression"),
            [
                (str(n), f"{s.value:.3f}", f"{s.reward_at_kl:.3f}", f"{s.length_at_kl:.2f}", _expression(told, n))
                for n, s in told.best.items()
            ],
        ),
    ]
    for name in dict.fromkeys(row.level.name for row in told.held_out):
        lines += _held_out_lines(name, [row for row in told.held_out if row.level.name == name])
    if told.later:
        lines += ["", "## Above the toy", "", *_table(*_later(told.later))]
    return "\n".join(lines) + "\n"


def _held_out_lines(name: str, rows: Sequence[HeldOut]) -> list[str]:
    level, others = rows[0].level, [row for row in rows if row.name != "dpo"]
    budgets = ", ".join(f"{budget:g}" for budget in KL_BUDGETS)
    measures = ("value", "reward", "reward_at_kl", "kl", "length")
    headings = ("loss", "value, worst beta", "reward, worst beta", "reward at equal KL", "mean KL", "mean length")
    betas = tuple(f"beta {beta:g}" for beta in level.betas)
    return [
        "",
        f"## {name[0].upper()}{name[1:]}",
        "",
        f"{len(level.seeds)} seeds, {len(level.betas)} betas, {level.steps} steps; 95% bootstrap intervals over "
        f"seeds. Equal KL: mean over {budgets} nats, on a curve that is straight in the root of KL between betas.",
        "",
        *_table(headings, [(row.name, *(_shown(row.measures.get(key)) for key in measures)) for row in rows]),
        "",
        "Minus DPO's, on the same seeds:",
        "",
        *_table(
            headings, [(row.name, *(_shown(row.against_dpo.get(key), "+") for key in measures)) for row in others]
        ),
        "",
        "Gold reward by beta, mean (lowest and highest of the seeds) / KL:",
        "",
        *_table(("loss", *betas), [(row.name, *_by_beta(row)) for row in rows]),
    ]


def _by_beta(row: HeldOut) -> list[str]:
    cells = []
    for beta in range(row.rows.shape[1]):
        reward, kl = row.rows[:, beta, 0], row.rows[:, beta, 1]
        cells.append(f"{reward.mean():.2f} ({reward.min():.2f}, {reward.max():.2f}) / {kl.mean():.2f}")
    return cells


def _shown(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "broke"
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def _expression(told: Frontier, number: int) -> str:
    return next(f"`{row.expression}`" for row in told.rows if row.id == number)


def _reasons(rows: Sequence[Candidate]) -> Counter[str]:
    """How many candidates were refused for what, with numbers left out of the reasons."""
    kinds = {
        "text": "could not be read", "static: its": "static checks", "static: pairs": "static checks",
        "static: trains": "trains like an earlier one", "static: it uses": "statistics of the batch",
    }  # fmt: skip
    counts: Counter[str] = Counter()
    for row in rows:
        if row.reason:
            said = f"{row.level}: {row.reason}"
            counts[next((text for start, text in kinds.items() if said.startswith(start)), _plain(said))] += 1
    return counts


def _plain(reason: str) -> str:
    return reason.split(" at beta")[0]


def _later(results: Sequence[Result]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = list(dict.fromkeys(name for result in results for name in result.details))
    rows = [
        (str(r.candidate), r.level, f"{r.beta:g}", str(r.seed), *(_cell(r.details.get(name)) for name in names))
        for r in results
    ]
    return ("candidate", "level", "beta", "seed", *names), rows


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str("" if value is None else value)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def _draw(told: Frontier, path: Path) -> None:
    """Reward over KL on the held-out problems: one line for each loss, one point for each beta."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.level.name for row in told.held_out))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for name, panel in zip(names, panels, strict=True):
        for row in told.held_out:
            if row.level.name == name:
                means, spread = row.rows.mean(0), row.rows.std(0)
                style = "o-" if row.name.startswith("candidate") else "s--"
                panel.errorbar(
                    means[:, 1], means[:, 0], yerr=spread[:, 0], fmt=style, label=row.name, ms=4, lw=1, alpha=0.8
                )
        panel.set_title(name)
        panel.set_xlabel("KL from the reference, nats")
    panels[0].set_ylabel("gold reward (bars: deviation over seeds)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)
