"""Files that come with the package: recipes, configs and their chat templates, found by name.

A wheel has them in `prefopt/shipped/`; a checkout has them in its own `recipes/` and `configs/`. Nothing imported here
takes long, so that shell completion can list the names.
"""

from __future__ import annotations

from pathlib import Path

from prefopt.safety.errors import did_you_mean

_PACKAGE = Path(__file__).parents[1]
SHIPPED = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""The folder that has `recipes/` and `configs/`."""


def shipped_names(folder: str, ending: str = ".yaml") -> list[str]:
    """The files of `recipes` or `configs`, without their ending: `dpo`, `papers/simpo`, `accelerate/fsdp2`."""
    root = SHIPPED / folder
    return sorted(file.relative_to(root).with_suffix("").as_posix() for file in root.rglob(f"*{ending}"))


def find_shipped(name: str, folder: str, ending: str = ".yaml") -> Path | None:
    """The file of this name, or None.

    Args:
        name: one of `shipped_names`; may have its folder and ending, as in `configs/papers/simpo.yaml`, and may leave
            `papers/` out.
        folder: `recipes` or `configs`.
        ending: of the file.
    """
    short = _short(name, folder, ending)
    known = shipped_names(folder, ending)
    match = next((each for each in (short, f"papers/{short}") if each in known), None)
    return None if match is None else SHIPPED / folder / f"{match}{ending}"


def near_names(name: str, folder: str, ending: str = ".yaml") -> str:
    """` Did you mean 'simpo'?`, or nothing if no file has a name like this."""
    known = [each.removeprefix("papers/") for each in shipped_names(folder, ending)]
    return did_you_mean(_short(name, folder, ending).removeprefix("papers/"), known)


def _short(name: str, folder: str, ending: str) -> str:
    return name.removeprefix(f"{folder}/").removesuffix(ending)
