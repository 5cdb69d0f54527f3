"""The table of all claims and one page a paper, as Markdown."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefopt.catalogue.markdown import table
from prefopt.reproduction.paper import Paper
from prefopt.reproduction.pictures import draw
from prefopt.reproduction.run import Result
from prefopt.reproduction.verdict import Verdict
from prefopt.safety.files import write_text

VERDICTS: tuple[Verdict, ...] = ("holds", "partly", "does not hold", "error", "not run", "cannot be run here")

INTRODUCTION = (
    "`prefopt reproduce NAME` runs a paper's experiments and writes such a page, with results.json and receipt.json; "
    "`--quick` leaves out those on the 135M model and other long ones. A stopped run continues. An experiment runs "
    "again when its code, rows, model or environment have changed. `prefopt reproduce --receipt receipt.json` repeats "
    "a run and says what differs.",
    "",
    "A verdict is computed from the numbers: of rules over several seeds, a claim holds if every rule holds in every "
    "seed, does not hold if no rule holds in any seed, and holds partly otherwise. Nothing was tuned until it held. "
    "Where a number is `mean ± half`, it is the 95% interval of the mean over seeds (Student's t). Places in the "
    "papers are cited from memory. These are small experiments: what holds on a table may fail on a language model.",
)


def write_pages(papers: Sequence[Paper], results: Sequence[Result], out: Path, facts: Sequence[str]) -> list[Path]:
    """`reproduction.md`, `reproduction/NAME.md` and the pictures, which need matplotlib (the `plot` extra).

    Args:
        papers: whose claims these are.
        results: one for each claim.
        out: folder; the files in it are replaced.
        facts: lines about the run: command, machine, time.

    Returns:
        The files.
    """
    folder = out / "reproduction"
    folder.mkdir(parents=True, exist_ok=True)
    files = [out / "reproduction.md"]
    write_text(files[0], table_page(papers, results, facts))
    for paper in papers:
        own = [result for result in results if result.paper == paper.name]
        pictures = {result.claim.id: draw(result, folder) for result in own if result.picture is not None}
        files += [folder / f"{paper.name}.md", *(picture for picture in pictures.values() if picture)]
        write_text(folder / f"{paper.name}.md", paper_page(paper, own, pictures))
    return files


def summary(results: Sequence[Result]) -> str:
    """`90 hold, 2 hold partly, ...`, in one line."""
    counts = Counter(result.verdict for result in results)
    return ", ".join(f"{counts[verdict]} {_plural(verdict)}" for verdict in VERDICTS if counts[verdict])


def _plural(verdict: str) -> str:
    words = {"holds": "hold", "partly": "hold partly", "does not hold": "do not hold", "error": "ended in an error"}
    return words.get(verdict, verdict)


def table_page(papers: Sequence[Paper], results: Sequence[Result], facts: Sequence[str]) -> str:
    """A section a paper with a row a claim."""
    facts = [*facts, f"{len(results)} claims: {summary(results)}."]
    lines = ["# Papers, reproduced", "", *(f"- {fact}" for fact in facts), ""]
    lines += [*INTRODUCTION, ""]
    for paper in papers:
        own = [result for result in results if result.paper == paper.name]
        rows = [
            (text(r.claim.statement), text(r.claim.number), text(r.interval or _short(r.measured)), _bold(r.verdict))
            for r in own
        ]
        lines += [f"## {paper.short}", "", f"[{text(paper.title)}](https://arxiv.org/abs/{paper.arxiv})"]
        lines[-1] += f" · [all of it](reproduction/{paper.name}.md)"
        lines += ["", table(("claim", "the paper's number", "measured here", "verdict"), rows), ""]
    return "\n".join(lines)


def paper_page(paper: Paper, results: Sequence[Result], pictures: dict[str, Path | None]) -> str:
    """Claims with all that decides them, and the run at full size."""
    link = f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
    lines = [f"# {paper.short}", "", f"{text(paper.title)}, arXiv {link}.", ""]
    lines += ["```bash", f"prefopt reproduce {paper.name}", "```", ""]
    lines += [f"{len(results)} claims: {summary(results)}.", ""]
    for result in results:
        lines += [f"## {result.claim.id}", "", f"{text(result.claim.statement)}.", ""]
        lines += [f"- {name}: {value}" for name, value in _details(result) if value]
        picture = pictures.get(result.claim.id)
        lines += ["", *([f"![{text(result.claim.statement)}]({picture.name})", ""] if picture else [])]
    return "\n".join([*lines, *_full_size(paper)])


def _details(result: Result) -> list[tuple[str, str]]:
    claim = result.claim
    seconds = f"{result.seconds:.0f} s of processor time" if result.seconds else ""
    return [
        ("place", text(claim.source)),
        ("the paper's number", text(claim.number)),
        ("run here", text(claim.scale)),
        ("counts as agreement", text(claim.tolerance)),
        ("measured", text(result.measured)),
        ("over seeds", text(result.interval)),
        ("verdict", _bold(result.verdict)),
        ("chosen here", text(result.settings)),
        ("note", text(claim.note)),
        ("experiment", f"`{claim.experiment}`{seconds and f', {seconds}'}" if claim.experiment else ""),
    ]


def _full_size(paper: Paper) -> list[str]:
    lines = ["## At full size", ""]
    if paper.commands:
        lines += ["```bash", *paper.commands, "```", ""]
    if paper.configs:
        lines += [f"Configuration: {', '.join(f'`{config}`' for config in paper.configs)}.", ""]
    if paper.by_hand:
        lines += ["Left to you:", "", *(f"- {text(each.bring)}: {text(each.why)}." for each in paper.by_hand), ""]
    return lines


def text(words: str) -> str:
    """Plain text as Markdown."""
    escaped = html.escape(words, quote=False)
    for mark in "*_":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped


def _bold(verdict: str) -> str:
    return verdict if verdict == "holds" else f"**{verdict}**"


def _short(measured: str, most: int = 240) -> str:
    return measured if len(measured) <= most else f"{measured[:most].rsplit(' ', 1)[0]} ..."
