"""One call for `prefopt discover`: search, train the best above the toy, write the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefopt.discovery.archive import Archive
from prefopt.discovery.page import measure_frontier, verdict, write_page
from prefopt.discovery.search import Proposer, Say, Search, SearchOptions
from prefopt.discovery.trained import TrainedLevel, train_best


def run(
    options: SearchOptions, proposer: Proposer | None = None, later: Sequence[TrainedLevel] = (), say: Say = print
) -> Sequence[Path]:
    """Search, or continue a search, and write its page.

    Args:
        options: of the search.
        proposer: from outside, besides evolution.
        later: levels above the toy, each for the best of the one before.
        say: called with a line for each step.

    Returns:
        The files of the page.
    """
    archive = Archive(options.out)
    try:
        members = Search(options, archive, proposer, say).run()
        if not members:
            say("The search ended before its seeds were trained: give it more time or candidates")
            return []
        seeds = len(options.seeds)
        order = [member.number for member in members if member.number >= seeds]
        for level in later:
            order = [
                number for number in train_best(archive, level, order, options.out / "runs", say) if number >= seeds
            ]
        say("Comparing the best candidates with DPO and LRML on held-out problems")
        told = measure_frontier(archive, members, [level.name for level in later])
        files = write_page(told, options.out)
        say(verdict(told.held_out))
        say(f"Written: {', '.join(map(str, files))}")
        return files
    except KeyboardInterrupt:
        say("Stopped. What was trained is stored, and the same command continues.")
        raise
    finally:
        archive.close()
