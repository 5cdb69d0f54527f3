"""The steps of every recipe: arguments, preflight, data, trainer, run. Each returns what the next one needs.

A recipe is these calls with its own loss. Imports everything below it in the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.safety.imports import collector_paused

with collector_paused():
    from prefopt.recipe.arguments import Recipe, RecipeArguments, parse_arguments
    from prefopt.recipe.build import make_trainer
    from prefopt.recipe.data import Data, load_data
    from prefopt.recipe.dry_run import dry_run
    from prefopt.recipe.ready import Ready, preflight
    from prefopt.recipe.run import run

__all__ = [
    "Data", "Ready", "Recipe", "RecipeArguments", "dry_run", "load_data", "main", "make_trainer", "parse_arguments",
    "preflight", "run",
]  # fmt: skip


def main(loss: str, argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run a recipe; `recipes/dpo.py` writes out the same steps.

    Args:
        loss: the loss expression, unless the command line or a config has another.
        argv: the command line's words; default: those of this process.

    Returns:
        The content of `results.json` in the output folder; None after a dry run.
    """
    recipe = parse_arguments(loss, argv)
    if recipe.script.dry_run:
        dry_run(recipe)
        return None
    ready = preflight(recipe)
    data = load_data(recipe, ready)
    return run(recipe, make_trainer(recipe, ready, data))
