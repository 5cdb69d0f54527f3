"""Write the table of docs/architectures.md: every causal language model of transformers, tiny, in the tree layout.

python scripts/write_architectures_table.py                     # all of them, for some minutes
python scripts/write_architectures_table.py llama mamba         # print the lines of some
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.architectures import ARCHITECTURES, Finding, examine  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- end -->"
HEADER = """| architecture | layout | largest difference of a row in trees: float32 | bfloat16 | why not in trees |
|---|---|---|---|---|
"""


def line(finding: Finding) -> str:
    """A row of the table."""

    def nats(value: float | None) -> str:
        return "" if value is None else f"{value:.0e}"

    reason = finding.reason.replace("|", "\\|").replace("\n", " ")
    return f"| {finding.name} | {finding.layout} | {nats(finding.exact)} | {nats(finding.half)} | {reason} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all if none is named")
    names = parser.parse_args().names
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    lines = []
    for name in names or ARCHITECTURES:
        lines.append(line(examine(name)))
        print(lines[-1], end="", flush=True)
    if names:
        return
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"With transformers {transformers.__version__}:\n\n{HEADER}{''.join(lines)}"
    PAGE.write_text(f"{before}{BEGIN}{made}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
