"""docs/reproduction.md and its pages, from the output folder of `prefopt reproduce`, finished or not.

python scripts/write_reproduction.py runs/reproduction "prefopt reproduce --all --quick"
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from prefopt.reproduction.pages import write_pages
from prefopt.reproduction.paper import read_papers
from prefopt.reproduction.receipt import facts_of, receipt_of
from prefopt.reproduction.run import kept_results

DOCS = Path(__file__).parents[1] / "docs"


def main(out: Path, command: str, docs: Path = DOCS) -> None:
    papers = read_papers()
    receipt = receipt_of(papers, quick=False, threads=1, folder=out)
    shutil.rmtree(docs / "reproduction", ignore_errors=True)
    results = [result for paper in papers for result in kept_results(paper, out)]
    write_pages(papers, results, docs, facts_of(receipt, command))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2])
