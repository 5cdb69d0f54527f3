"""From a command line and a `--config` file to a `Recipe`: read, completed with defaults, and checked.

The only part of the recipe that ends the program (`SystemExit`). Reads only options, never data or models.
"""

from prefopt.recipe.arguments.options import LOSS_FILE, Recipe, RecipeArguments
from prefopt.recipe.arguments.parse import DEMO_CONFIG, parse_arguments

__all__ = ["DEMO_CONFIG", "LOSS_FILE", "Recipe", "RecipeArguments", "parse_arguments"]
