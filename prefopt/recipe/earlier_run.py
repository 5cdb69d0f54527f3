"""What becomes of an earlier run in the output folder: it is moved aside, or the new run is refused; never overwritten
in silence.

Only the folder that recipes take by themselves (`runs/latest`) is emptied so; a folder that was named is the person's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState

from prefopt.safety.errors import UsageError

if TYPE_CHECKING:
    from prefopt.recipe.arguments import Recipe

RESULTS = (
    "results.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
"""Files that a run leaves when it has finished."""

OF_THE_EARLIER = ("results.json", "before.json")
"""Files that would be taken for the new run's if it were killed before it has written its own."""


def refuse_overwriting(recipe: Recipe) -> None:
    """Refuse a folder that was named and holds a model or results, unless the run resumes or may overwrite them.

    Raises:
        UsageError: naming the folder, what is in it, and the options.
    """
    found = _found(recipe)
    if found and recipe.output_named and not recipe.script.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {recipe.training.output_dir} holds an earlier run ({', '.join(found)}): give another "
            "--output_dir, add --overwrite_output_dir to write over it, or --resume_from_checkpoint auto to resume it"
        )


def make_room(recipe: Recipe) -> None:
    """Move an earlier run out of the folder that the recipe takes by itself, or say that it is overwritten.

    Every process must call it; called again, it does nothing.
    """
    if recipe.has_room:
        return
    recipe.has_room = True
    state = PartialState()
    if state.is_main_process and (found := _found(recipe)):
        folder = Path(recipe.training.output_dir)
        if recipe.script.overwrite_output_dir:
            for name in OF_THE_EARLIER:
                (folder / name).unlink(missing_ok=True)
            recipe.console.print(f"Writing over the earlier run in {folder} ({', '.join(found)}).", soft_wrap=True)
        else:
            aside = next(
                path for n in range(1, 10**9) if not (path := folder.with_name(f"{folder.name}-{n}")).exists()
            )
            folder.rename(aside)
            folder.mkdir()
            recipe.console.print(f"The earlier run in {folder} is now {aside}.", soft_wrap=True)
    state.wait_for_everyone()


def _found(recipe: Recipe) -> list[str]:
    if str(recipe.training.resume_from_checkpoint).lower() not in ("none", "false", ""):
        return []
    folder = Path(recipe.training.output_dir)
    return [name for name in RESULTS if (folder / name).is_file()]
