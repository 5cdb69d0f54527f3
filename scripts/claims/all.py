"""Every claim script in turn, and one table of what holds. Those on the 135M model run with --lm only.

python scripts/claims/all.py --json claims.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import Claim, show

HERE = Path(__file__).parent
SLOW = ("lm", "conflict_lm", "npo_lm")


def names() -> list[str]:
    found = sorted(file.stem for file in HERE.glob("*.py") if not file.stem.startswith("_"))
    return [name for name in found if name not in ("all", *SLOW)]


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def markdown(name: str, report: dict[str, Any]) -> str:
    """One script's claims as a section with a table; what was chosen here stands below it, once each."""
    title = report["title"].strip().splitlines()[0]
    lines = [f"## `{name}.py`", "", f"{title} {report['seconds']:.0f} s.", ""]
    lines += ["| source | claim | measured | outcome |", "|---|---|---|---|"]
    for claim in report["claims"]:
        outcome = "holds" if claim["holds"] else "**does not hold**"
        cells = [escaped(claim[column]) for column in ("source", "claim", "measured")]
        lines.append(f"| {' | '.join(cells)} | {outcome} |")
    chosen = dict.fromkeys(claim["settings"] for claim in report["claims"] if claim["settings"])
    if chosen:
        lines += ["", "Chosen here:", "", *(f"- {escaped(settings)}" for settings in chosen)]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes here as well")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables of docs/notes/claims.md here")
    parser.add_argument("--lm", action="store_true", help="run the scripts on the bundled 135M model too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"scripts to run: {', '.join([*names(), *SLOW])}")
    args = parser.parse_args()
    chosen = args.only or [*names(), *(SLOW if args.lm else [])]
    reports, failed, started = {}, [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            print(f"{name} ...", flush=True)
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                failed.append(name)
                print(done.stdout + done.stderr, file=sys.stderr)
                continue
            reports[name] = json.loads(file.read_text(encoding="utf-8"))
    claims = [Claim(**claim) for report in reports.values() for claim in report["claims"]]
    held = sum(claim.holds for claim in claims)
    show(claims, f"{held} of {len(claims)} claims hold", time.monotonic() - started)
    for name, report in reports.items():
        print(f"{name}: {report['seconds']:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(
            "\n".join(markdown(name, report) for name, report in reports.items()), encoding="utf-8"
        )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
