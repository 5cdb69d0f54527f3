"""The table of docs/papers.md, made from configs/papers/*.yaml, and the numbers of them in README.md.

python scripts/papers_table.py            # prints it
python scripts/papers_table.py --write    # writes both
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from prefopt.catalogue.markdown import table

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "papers"
PAGE = ROOT / "docs" / "papers.md"
README = ROOT / "README.md"
START, END = "<!-- table: scripts/papers_table.py -->", "<!-- end of the table -->"

HEADINGS = ("config", "paper", "setting", "loss", "model", "data", "reported", "source", "unknown")


def papers_table(folder: Path = CONFIGS) -> str:
    """One row a config, in alphabetical order."""
    configs = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.yaml"))}
    return table(HEADINGS, [_cells(name, config, config["paper"]) for name, config in configs.items()])


def is_complete(config: dict[str, Any]) -> bool:
    """Whether a config names a published model and data set, and leaves no value unknown."""
    names = [config.get("model_name_or_path"), _data(config)]
    made_first = ("runs/", "data/")
    return not config["paper"]["unknown"] and all(name and not str(name).startswith(made_first) for name in names)


def _data(config: dict[str, Any]) -> str | None:
    return config.get("dataset_name", config.get("forget_set"))


def _cells(name: str, config: dict[str, Any], paper: dict[str, Any]) -> tuple[str, ...]:
    numbers = paper["arxiv"] if isinstance(paper["arxiv"], list) else [paper["arxiv"]]
    links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)
    sources = "<br>".join(f"[{marks}] {where}" for marks, where in _by_repository(paper["source"]))
    return (
        f"[{name}](../configs/papers/{name}.yaml)",
        f"{paper['title']}, {links}",
        paper["setting"],
        f"`{config['loss']}`",
        config.get("model_name_or_path", "unknown: bundled"),
        _data(config) or "unknown: bundled",
        str(paper["reported"]),
        sources or "from memory, or ours",
        ", ".join(paper["unknown"]),
    )


def _by_repository(source: dict[int, str]) -> list[tuple[str, str]]:
    """Marks that share a repository in one line; papers stay whole."""
    marks: dict[str, list[str]] = {}
    for mark, text in source.items():
        where = text.split(" ")[0] if "@" in text else text
        marks.setdefault(where, []).append(str(mark))
    return [(", ".join(numbers), where) for where, numbers in marks.items()]


def counted(text: str) -> str:
    """A text with the numbers of all and of complete configs as they are now."""
    files = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in CONFIGS.glob("*.yaml")]
    complete = sum(map(is_complete, files))
    text = re.sub(r"\d+ config files name", f"{len(files)} config files name", text)
    text = re.sub(r"\d+ of them are complete", f"{complete} of them are complete", text)
    return re.sub(r"\d+ of the \d+ files are complete", f"{complete} of the {len(files)} files are complete", text)


def main() -> None:
    if "--write" not in sys.argv[1:]:
        print(papers_table())
        return
    README.write_text(counted(README.read_text(encoding="utf-8")), encoding="utf-8")
    page = counted(PAGE.read_text(encoding="utf-8"))
    before, rest = page.split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n\n{papers_table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
