"""Unlearning: learn (or take a model that has learned), make the gold model, forget, measure.

`recipes/unlearn.py` writes out the steps of `main`.
"""

from prefopt.recipe.unlearning.options import UnlearningArguments
from prefopt.recipe.unlearning.sets import Sets, load_sets
from prefopt.recipe.unlearning.stages import (
    Measurements,
    Models,
    dry_run,
    learned_models,
    main,
    make_trainer,
    measure_first,
    run,
)

__all__ = [
    "Measurements", "Models", "Sets", "UnlearningArguments", "dry_run", "learned_models", "load_sets", "main",
    "make_trainer", "measure_first", "run",
]  # fmt: skip
