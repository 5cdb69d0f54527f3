"""`prefopt sweep`: one data set, one reference, many losses, hyperparameters or seeds, compared on an equal footing.

    from rich.console import Console
    from prefopt.recipe.sweep import SweepCall, run_sweep

    results = run_sweep(SweepCall("sweeps/losses"), Console())

The steps, one file each: `plan` reads the config, `check` tries every setting without training, `study` hands out
trials, `trial` trains one as `prefopt train` would, `shared` does once what trials have in common, `measures` makes
the numbers that are compared, `outcome` ranks them, `show` prints, `workers` uses several devices, and `loop` puts it
together.
"""

from prefopt.recipe.sweep.loop import run_sweep
from prefopt.recipe.sweep.measures import MEASURES
from prefopt.recipe.sweep.plan import SweepPlan, read_plan
from prefopt.recipe.sweep.workers import SweepCall

__all__ = ["MEASURES", "SweepCall", "SweepPlan", "read_plan", "run_sweep"]
