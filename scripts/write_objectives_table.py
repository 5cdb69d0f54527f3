"""Update the generated tables of README.md, docs/objectives.md and `prefopt losses` after a loss was added or changed.

    python scripts/write_objectives_table.py             # the tables
    python scripts/write_objectives_table.py --plots     # and the pictures, by the commands that the page shows

The text between `<!-- objectives: NAME -->` and `<!-- end -->` is replaced. NAME is a family, `presets`, `all` for the
overview of all objectives, or `families` for the README's list of families.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from prefopt.catalogue.tables import families, families_line, losses_table, objectives_table, presets_table
from prefopt.cli import app
from prefopt.cli.losses import LISTING, listing

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "objectives.md")
BLOCK = re.compile(r"<!-- objectives: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
COMMAND = re.compile(r"^prefopt (losses --plot (?:[^\n]|(?<=\\)\n)+)$", re.MULTILINE)


def table(name: str) -> str:
    """The generated table called `name`."""
    if name == "all":
        return losses_table()
    if name == "families":
        return families_line()
    if name == "presets":
        return presets_table()
    members = {family.name: family.losses for family in families()}
    if name not in members:
        raise SystemExit(f"no family is called {name!r}; there are {', '.join(members)}")
    return objectives_table(members[name])


def rewritten(text: str) -> str:
    """A page with its tables as the registry has them."""
    return BLOCK.sub(lambda block: f"<!-- objectives: {block[1]} -->\n{table(block[1])}\n<!-- end -->", text)


def listing_text() -> str:
    """The file that `prefopt losses` prints: a line for each objective, so that changes can be read."""
    write = json.JSONEncoder(ensure_ascii=False).encode
    groups = []
    for group in listing():
        entries = ",\n".join(map(write, group["objectives"]))
        groups.append(
            f'{{"name": {write(group["name"])}, "about": {write(group["about"])}, "objectives": [\n{entries}]}}'
        )
    return "[" + ",\n".join(groups) + "]\n"


def plot_commands(text: str) -> list[list[str]]:
    """The words of every `prefopt losses --plot` command on a page, without `prefopt`."""
    return [shlex.split(command.replace("\\\n", " ")) for command in COMMAND.findall(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", action="store_true", help="draw the pictures too; run it in the project's root")
    arguments = parser.parse_args()
    LISTING.write_text(listing_text(), encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(rewritten(text), encoding="utf-8")
        for words in plot_commands(text) if arguments.plots else []:
            print(CliRunner().invoke(app, words).output.strip())


if __name__ == "__main__":
    main()
