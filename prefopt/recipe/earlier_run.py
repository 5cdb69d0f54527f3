"""An earlier run in the output folder: it is moved aside, or the new run is refused.

Only the default folder (`runs/latest`) is moved aside. A folder that `--output_dir` names is left as it is.
"""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState

from prefopt.recipe.arguments import LOSS_FILE, Recipe
from prefopt.report.folder import BESIDE_THE_MODEL
from prefopt.safety.errors import UsageError
from prefopt.safety.folders import what_is_there

RESULTS = "results.json"


def refuse_overwriting(recipe: Recipe) -> None:
    """Refuse a folder that was named and holds a model or results, unless the run resumes or may overwrite them.

    Raises:
        UsageError: naming the folder, what is in it, and the options.
    """
    names = _of_a_finished_run(recipe)
    if names and recipe.output_named and not recipe.script.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {recipe.training.output_dir} holds an earlier run ({', '.join(names)}): use another "
            "--output_dir, add --overwrite_output_dir to overwrite it, or --resume_from_checkpoint auto to resume it"
        )


def make_room(recipe: Recipe) -> None:
    """Move an earlier run out of the default folder, or print that it is overwritten.

    Every process must call it, once.
    """
    state = PartialState()
    if state.is_main_process and (names := _of_a_finished_run(recipe)):
        folder = Path(recipe.training.output_dir)
        if recipe.script.overwrite_output_dir:
            # Otherwise a run killed before it writes its own would seem to have them.
            for name in (RESULTS, LOSS_FILE, *BESIDE_THE_MODEL):
                (folder / name).unlink(missing_ok=True)
            recipe.console.print(f"Overwriting the earlier run in {folder} ({', '.join(names)}).", soft_wrap=True)
        else:
            aside = next(
                path for n in range(1, 10**9) if not (path := folder.with_name(f"{folder.name}-{n}")).exists()
            )
            folder.rename(aside)
            folder.mkdir()
            recipe.console.print(f"The earlier run in {folder} is now {aside}.", soft_wrap=True)
    state.wait_for_everyone()


def _of_a_finished_run(recipe: Recipe) -> list[str]:
    """Files of a finished run in the folder; none if this run resumes it."""
    if str(recipe.training.resume_from_checkpoint).lower() not in ("none", "false", ""):
        return []
    folder = Path(recipe.training.output_dir)
    contents = what_is_there(folder)
    results = [RESULTS] if (folder / RESULTS).is_file() else []
    return results + [name for name in (*contents.weights, *contents.adapter) if "-of-" not in name]
