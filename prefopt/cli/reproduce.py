"""`prefopt reproduce`: from papers to verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt.cli.app import app, console, say
from prefopt.safety.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefopt.reproduction import Paper, Result

OUT = Path("runs/reproduction")


@app.command()
def reproduce(
    papers: Annotated[
        list[str] | None, typer.Argument(help="Names, such as hdpo, or arXiv ids. Without any: a list of all.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All papers.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what takes minutes: the 135M model.")] = False,
    out: Annotated[Path | None, typer.Option(help=f"Where results go; {OUT} if left out.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch. Numbers may depend on it.")] = 1,
    receipt: Annotated[
        Path | None, typer.Option(help="Repeat the run of this receipt.json, and say what differs.")
    ] = None,
) -> None:
    """Test a paper's claims with small experiments, and print how to run it at full size. A stopped run continues."""
    if receipt is not None:
        if papers or everything or quick:
            raise UsageError("--receipt names papers and options itself: leave out PAPER, --all and --quick")
        return _repeat(receipt, out or Path(f"{OUT}-repeated"))
    if everything and papers:
        raise UsageError("--all is every paper: leave out the names, or --all")
    from prefopt.reproduction.paper import select

    chosen = select(papers or [])
    if not papers and not everything:
        return _list(chosen, out or OUT)
    _run(chosen, quick, out or OUT, threads, "--all" if everything else " ".join(papers or []))


def _run(papers: Sequence[Paper], quick: bool, out: Path, threads: int, named: str) -> None:
    from prefopt.reproduction import reproduce as run
    from prefopt.reproduction.pages import summary, write_pages
    from prefopt.reproduction.receipt import facts_of, receipt_of, write_receipt
    from prefopt.safety.noise import quiet_libraries

    quiet_libraries()
    results = run(papers, out, quick, threads, say)
    receipt = receipt_of(papers, quick, threads, out)
    write_receipt(receipt, out)
    command = f"prefopt reproduce {named}{' --quick' if quick else ''}{f' --threads {threads}' if threads > 1 else ''}"
    write_pages(papers, results, out, facts_of(receipt, command))
    for paper in papers:
        _show(paper, [result for result in results if result.paper == paper.name])
    say(f"{len(results)} claims: {summary(results)}. Pages, results.json and receipt.json are in {out}.")


def _show(paper: Paper, results: Sequence[Result]) -> None:
    from rich.markup import escape

    from prefopt.safety.tables import table

    title = f"{paper.short}, arXiv {paper.arxiv}"
    verdicts = table("claim", "measured", "verdict", title=title, show_lines=True)
    verdicts.columns[0].ratio = verdicts.columns[1].ratio = 1
    verdicts.columns[2].min_width = 8
    for result in results:
        claim = f"[dim]{escape(result.claim.source)}[/]\n{escape(result.claim.statement)}"
        colour = {"holds": "green", "partly": "yellow"}.get(result.verdict, "red")
        verdicts.add_row(claim, escape(result.interval or result.measured), f"[{colour}]{result.verdict}[/]")
    console().print(verdicts)
    for command in paper.commands:
        say(f"At full size: {command}")


def _list(papers: Sequence[Paper], out: Path) -> None:
    from prefopt.reproduction.pages import summary
    from prefopt.reproduction.run import kept_results
    from prefopt.safety.tables import table

    listed = table("name", "paper", "claims", f"state in {out}")
    for paper in papers:
        results = kept_results(paper, out)
        listed.add_row(paper.name, f"{paper.short}, {paper.arxiv}", str(len(results)), summary(results))
    console().print(listed)
    say("prefopt reproduce NAME ... runs some, --all every one, --quick without the 135M model.")


def _repeat(file: Path, out: Path) -> None:
    from prefopt.reproduction.receipt import repeat

    lines, same = repeat(file, out, say)
    for line in lines:
        say(line)
    say("Every outcome is the same." if same else "Outcomes differ.")
    if not same:
        raise typer.Exit(1)
