"""A candidate of the archive as a file for `--loss_file`, with a test."""

from __future__ import annotations

import textwrap
from pathlib import Path

from prefopt.discovery.archive import Archive
from prefopt.discovery.levels import TOY
from prefopt.discovery.ranking import Score, scores
from prefopt.discovery.read import read
from prefopt.losses.registry import makers
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_text

_LOSS = '''"""A loss that `prefopt discover` proposed: candidate {number}, seed {seed}{parents}.

On the toy of the search:
{numbers}
"""

from __future__ import annotations

from prefopt.discovery import ExpressionLoss
from prefopt.losses import register


@register("{name}")
class {cls}(ExpressionLoss):
    """Candidate {number} of a search for losses, of the margin x = beta d.

    Args:
        beta: scale of the margin.

    Needs: reference sums.
    """

    expression = (
{expression}
    )
    formula = expression + ", x = beta*d"
    batchwise = {batchwise}
'''

_TEST = '''"""The loss of {file}: finite values and gradients, and the right direction at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefopt.losses import PreferenceBatch, Scores, parse
from prefopt.losses.from_file import register_file

register_file(Path(__file__).parent / "{file}")


def value_and_gradient(beta: float, margins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logps = margins.clone().requires_grad_()
    zero, one = torch.zeros_like(margins), torch.ones(margins.shape, dtype=torch.long)
    batch = PreferenceBatch(chosen=Scores(logps, one, zero), rejected=Scores(zero, one, zero))
    values = parse(f"{name}(beta={{beta}})").per_example(batch)
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    return values, gradient


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_is_finite_to_1000_and_pushes_the_chosen_answer_up(beta: float) -> None:
    x = torch.linspace(-1000, 1000, 2001, dtype=torch.float64)
    values, gradient = value_and_gradient(beta, x / beta)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[1000] < 0
'''


def export(
    archive: Archive, number: int, out: Path, name: str | None = None, overwrite: bool = False
) -> tuple[Path, Path]:
    """Write a candidate as a loss file, and its test beside it.

    Args:
        archive: of the search.
        number: of the candidate.
        out: the file, which ends in .py.
        name: of the loss; default: the file's, without .py.
        overwrite: whether other files of these names may be replaced.

    Returns:
        Both files.

    Raises:
        UsageError: for an unknown or refused candidate, a name that cannot be used, or another file there.
    """
    rows = archive.candidates("id = ?", [number])
    if not rows:
        raise UsageError(f"no candidate {number} in this archive; it has {len(archive.candidates())}, from 0 on")
    row = rows[0]
    if row.expression is None or row.level in ("text", "static"):
        raise UsageError(f"candidate {number} was refused: {row.reason or 'it was not trained yet'}")
    name = name or out.stem
    _check_name(name, out)
    expression = textwrap.wrap(row.expression, 100, break_long_words=False, drop_whitespace=False)
    scored = scores(archive.results(TOY.name, [number]))
    text = _LOSS.format(
        number=number, seed=row.seed, name=name, cls="".join(word.title() for word in name.split("_")) or "Loss",
        parents=f", from {' and '.join(map(str, row.parents))}" if row.parents else "",
        numbers=_numbers(scored.get(number)),
        expression="\n".join(f'        "{part}"' for part in expression),
        batchwise=read(row.expression).batchwise,
    )  # fmt: skip
    test = out.with_name(f"test_{out.name}")
    texts = {out: text, test: _TEST.format(file=out.name, name=name)}
    if others := [file for file in texts if file.exists() and not overwrite and not _holds(file, texts[file])]:
        raise UsageError(f"{others[0]} exists and is another file: name another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    for file, content in texts.items():
        write_text(file, content)
    return out, test


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8", errors="replace") == text


def _check_name(name: str, out: Path) -> None:
    if out.suffix != ".py" or not out.stem.isidentifier():
        raise UsageError(f"{out}: a loss file is a Python module, as in mine.py")
    if not name.isidentifier() or name != name.lower() or not name.isascii():
        raise UsageError(f"{name!r} cannot name a loss: use a lower-case Python identifier, with --name")
    if name in makers():
        raise UsageError(f"a loss is named {name} already: choose another --out or --name")


def _numbers(score: Score | None) -> str:
    if score is None:
        return "    screened only"
    return "\n".join(
        f"    beta {p.beta:g}: reward {p.reward:.3f}, KL {p.kl:.3f}, length {p.length:+.1f}" for p in score.points
    )
