"""The steps that every recipe script takes: arguments, data, trainer, run.

A recipe is these calls with a loss of its own. Imports everything below it in the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.recipe.arguments import Recipe, RecipeArguments, parse_arguments
from prefopt.recipe.build import make_trainer
from prefopt.recipe.data import load_data
from prefopt.recipe.dry_run import dry_run
from prefopt.recipe.run import run

__all__ = ["Recipe", "RecipeArguments", "dry_run", "load_data", "main", "make_trainer", "parse_arguments", "run"]


def main(loss: str, argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The whole of a recipe; `recipes/dpo.py` spells the same steps out.

    Args:
        loss: the loss expression, unless the command line or a config has another.
        argv: the command line's words; default: those of this process.
    """
    recipe = parse_arguments(loss, argv)
    if recipe.script.dry_run:
        dry_run(recipe)
        return None
    train, heldout = load_data(recipe)
    return run(recipe, make_trainer(recipe, train, heldout))
