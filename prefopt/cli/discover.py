"""`prefopt discover`: search for losses, and export one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefopt.cli.app import app, fail, say

discover = typer.Typer(help="Search for losses, from DPO and others, on a toy with a known reward.")
app.add_typer(discover, name="discover", invoke_without_command=True)

_SERVER, _TRAINED = "A language model that proposes", "Above the toy"


@discover.callback(invoke_without_command=True)
def search(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="Folder of the archive and the page.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Of searching, over all starts of the command.")] = None,
    candidates: Annotated[int | None, typer.Option(min=1, help="How many to propose at most.")] = None,
    seeds: Annotated[str, typer.Option(help="Losses to start from, with commas between them.")] = "dpo,hinge,ipo",
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    generation: Annotated[int, typer.Option(min=2, help="Candidates in a generation.")] = 16,
    batchwise: Annotated[
        bool, typer.Option("--batchwise", help="Allow statistics of the batch: batch_mean, batch_var.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that train; one per core, if left out.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server, up to /v1.", rich_help_panel=_SERVER)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its name at the server.", rich_help_panel=_SERVER)] = None,
    share: Annotated[float, typer.Option(help="Its share of the proposals.", rich_help_panel=_SERVER)] = 0.5,
    prompt: Annotated[
        Path | None, typer.Option(help="File of the prompt; prefopt's own, if left out.", rich_help_panel=_SERVER)
    ] = None,
    levels: Annotated[
        str, typer.Option(help="toy, or toy,model: the bundled model, too.", rich_help_panel=_TRAINED)
    ] = "toy",
    model_steps: Annotated[int, typer.Option(min=1, help="Steps of the bundled model.", rich_help_panel=_TRAINED)] = 8,
    config: Annotated[
        Path | None, typer.Option(help="Of `prefopt train`: the last level, for the best.", rich_help_panel=_TRAINED)
    ] = None,
) -> None:
    """Propose losses of the margin, check them, train with them. The same command continues a search."""
    if context.invoked_subcommand is not None:
        return
    if out is None:
        fail("name a folder for the archive: --out FOLDER")
    names = tuple(name.strip() for name in levels.split(",") if name.strip())
    if names not in (("toy",), ("toy", "model")):
        fail(f"--levels is toy or toy,model, got {levels}")
    if (endpoint is None) != (model is None):
        fail("--endpoint and --model go together")
    if endpoint is None and (prompt is not None or share != 0.5):
        fail("--share and --prompt are of a language model: name --endpoint and --model")
    from prefopt.discovery.ask import PROMPT, ServerProposer
    from prefopt.discovery.run import run
    from prefopt.discovery.search import SearchOptions
    from prefopt.discovery.trained import bundled_level, configured_level
    from prefopt.generation.endpoint import Endpoint
    from prefopt.recipe.arguments.threads import usable_cores

    start = tuple(name.strip() for name in seeds.split(",") if name.strip())
    options = SearchOptions(out, minutes, candidates, start, seed, generation, batchwise, workers or usable_cores())
    later = [bundled_level(model_steps)] if "model" in names else []
    later += [configured_level(config)] if config is not None else []
    if endpoint is None or model is None:
        run(options, None, later, say)
        return
    server = Endpoint(endpoint, concurrency=8, timeout=120.0, attempts=3)
    proposer = ServerProposer(server, model, share=share, prompt=prompt or PROMPT, batchwise=batchwise, say=say)
    try:
        run(options, proposer, later, say)
    finally:
        proposer.close()


@discover.command()
def export(
    candidate: Annotated[int, typer.Argument(help="Its number in the archive.")],
    out: Annotated[Path, typer.Option(help="The .py file to write; its test is written beside it.")],
    archive: Annotated[Path, typer.Option(help="Folder of the search.")],
    name: Annotated[str | None, typer.Option(help="Of the loss; the file's, if left out.")] = None,
) -> None:
    """Write a candidate as a file for --loss_file, with a test."""
    from prefopt.discovery.archive import Archive
    from prefopt.discovery.export import export as write

    database = Archive(archive, make=False)
    try:
        loss, test = write(database, candidate, out, name)
    finally:
        database.close()
    say(f"Written: {loss} and {test}. To train: prefopt train --loss_file {loss} --loss {name or out.stem} ...")
