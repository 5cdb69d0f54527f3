"""The config of a sweep: a recipe's options as the base, and a `sweep:` section that says what varies.

Reads only the file: no model, no data. Options themselves are checked by `prefopt.recipe.sweep.check`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prefopt.recipe.arguments.config_file import read_config
from prefopt.recipe.sweep.measures import DEFAULT_MEASURE, MEASURES
from prefopt.safety.errors import UsageError, did_you_mean
from prefopt.safety.files import is_file
from prefopt.safety.shipped import find_shipped, near_names

METHODS = ("grid", "random", "tpe")
DIRECTIONS = ("maximize", "minimize")
DEFAULT_FOLDER = "runs/sweep"
_KEYS = ("axes", "method", "trials", "measures", "prune", "seeds", "search_seed")
_OF_THE_SWEEP = {
    "output_dir": "the folder of the sweep, one for all trials",
    "seed": "seeds are listed under sweep: seeds",
    "resume_from_checkpoint": "an interrupted trial resumes by itself",
    "overwrite_output_dir": "a sweep continues in its folder",
    "dry_run": "prefopt sweep CONFIG --dry_run lists the trials",
    "demo": "leave model and data out of the config for the bundled ones",
    "push_to_hub": "push the best model afterwards, with the command that the sweep prints",
    "reference_cache": "it changes no result",
    "dataset_streaming": "a sweep compares trials on held-out rows that are read many times",
}
_DATA = ("dataset_", "columns", "format", "eval_rows", "on_bad_rows", "chat_template")
_LOSS_VALUES = ("loss", "eval_loss", "train_loss")
_MOST_TRIALS = 10_000


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    Attributes:
        low, high: both included.
        log: whether equal ratios are equally likely, instead of equal differences.
        points: how many a grid takes; None if it is not for a grid.
        whole: whether the numbers are whole.
    """

    low: float
    high: float
    log: bool = False
    points: int | None = None
    whole: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """`low` and `high`, as whole numbers where the numbers are."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def grid(self) -> tuple[float, ...]:
        """`points` numbers at equal distances, or ratios, ends included."""
        assert self.points is not None
        parts = [n / (self.points - 1) for n in range(self.points)] if self.points > 1 else [0.0]
        if self.log:
            values = [float(f"{self.low * (self.high / self.low) ** part:.6g}") for part in parts]
        else:
            values = [float(f"{self.low + (self.high - self.low) * part:.6g}") for part in parts]
        return tuple(dict.fromkeys(round(value) if self.whole else value for value in values))


Axis = tuple[Any, ...] | Range
"""The values of an option, or the range that they are drawn from."""


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep tries, and how it judges.

    Attributes:
        base: options that all trials share.
        axes: options that vary, each with its values or its range.
        folder: of the sweep.
        source: the config file.
        method: one of `METHODS`.
        trials: how many settings `random` and `tpe` try; for a grid, how many it has.
        measures: names of `MEASURES` and their directions; the first decides.
        prune: whether a trial stops early that is worse than the median of the earlier ones at the same step.
        seeds: each setting is trained with each of them.
        search_seed: of the draws of `random` and `tpe`.
    """

    base: Mapping[str, Any]
    axes: Mapping[str, Axis]
    folder: Path
    source: Path
    method: str
    trials: int
    measures: Mapping[str, str]
    prune: bool
    seeds: tuple[int, ...]
    search_seed: int

    def values(self, name: str) -> tuple[Any, ...] | None:
        """The values of an axis; None for a range that numbers are drawn from."""
        axis = self.axes[name]
        if not isinstance(axis, Range):
            return axis
        return axis.grid() if self.method == "grid" else None

    def grid(self) -> list[dict[str, Any]]:
        """Every setting of a grid, in the order of the config; the last axis varies fastest."""
        values = [self.values(name) or () for name in self.axes]
        return [dict(zip(self.axes, point, strict=True)) for point in itertools.product(*values)]

    def settings_to_check(self) -> list[dict[str, Any]]:
        """Settings that have every value of every axis, and both ends of every range; for a grid, all of it."""
        if self.method == "grid":
            return self.grid()
        values = {name: axis.ends if isinstance(axis, Range) else axis for name, axis in self.axes.items()}
        first = {name: of_axis[0] for name, of_axis in values.items()}
        others = [{**first, name: value} for name, of_axis in values.items() for value in of_axis[1:]]
        return [first, *others]

    def options(self, setting: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """The options of one run, as the config of `prefopt train` has them."""
        return {**self.base, **setting, "seed": seed}

    def identity(self) -> dict[str, Any]:
        """What must not change while a sweep is continued. The number of trials of a search may."""
        axes = {name: vars(axis) if isinstance(axis, Range) else list(axis) for name, axis in self.axes.items()}
        return {
            "base": dict(self.base), "axes": axes, "method": self.method, "measures": dict(self.measures),
            "prune": self.prune, "seeds": list(self.seeds), "search_seed": self.search_seed,
        }  # fmt: skip


def read_plan(config: str, changes: Mapping[str, Any] | None = None, folder: str | None = None) -> SweepPlan:
    """The plan in a config file.

    Args:
        config: the file, or the name of a config that comes with the package (`sweeps/losses`).
        changes: base options that replace the file's.
        folder: of the sweep, instead of the file's `output_dir`.

    Raises:
        UsageError: naming what is wrong in the file.
        SystemExit: if the file cannot be read, or is not a mapping.
    """
    path = Path(config) if is_file(Path(config)) else find_shipped(config, "configs")
    if path is None:
        raise UsageError(
            f"{config}: there is no such file, and prefopt has no config of this name.{near_names(config, 'configs')}"
        )
    options = read_config(path)
    section = options.pop("sweep", None)
    where = f"{path}: sweep"
    if not isinstance(section, dict):
        raise UsageError(f"{where}: the config has no such section; it says what varies (docs/sweep.md)")
    if unknown := [name for name in section if name not in _KEYS]:
        raise UsageError(
            f"{where}: there is no key {unknown[0]!r}.{did_you_mean(str(unknown[0]), _KEYS)} Keys are {_listed(_KEYS)}"
        )
    base = {**options, **(changes or {})}
    own = base.pop("output_dir", None)
    seeds = _seeds(section.get("seeds"), base, where)
    axes = _axes(section.get("axes", {}), base, where)
    if not axes and len(seeds) < 2:
        raise UsageError(f"{where}: nothing varies: name options under axes, or several seeds")
    for name in base:
        if name in _OF_THE_SWEEP:
            raise UsageError(f"{path}: {name} cannot be set here: {_OF_THE_SWEEP[name]}")
    method = _method(section.get("method", "grid"), axes, where)
    measures = _measures(section.get("measures", DEFAULT_MEASURE), where)
    if "kl" in measures and not (base.get("eval_answers") or "eval_answers" in axes):
        raise UsageError(f"{where}: measures: kl is estimated on answers: add eval_answers: 32 to the config")
    return SweepPlan(
        base, axes, Path(folder or own or DEFAULT_FOLDER), path, method,
        trials=_trials(section, method, axes, where),
        measures=measures,
        prune=_prune(section, measures, base, where),
        seeds=seeds,
        search_seed=_whole(section.get("search_seed", 0), f"{where}: search_seed", least=0),
    )  # fmt: skip


# ---- axes ----------------------------------------------------------------------------------------------------------


def _axes(section: Any, base: Mapping[str, Any], where: str) -> dict[str, Axis]:
    if not isinstance(section, dict):
        raise UsageError(f"{where}: axes must be a mapping of options to lists or ranges")
    axes: dict[str, Axis] = {}
    for name, values in section.items():
        at = f"{where}: axes: {name}"
        if name in _OF_THE_SWEEP:
            raise UsageError(f"{at}: cannot vary: {_OF_THE_SWEEP[name]}")
        if str(name).startswith(_DATA):
            raise UsageError(f"{at}: cannot vary: trials are compared on the same rows; make one sweep per data set")
        if name in base:
            raise UsageError(f"{at}: is also an option of the base: leave one of the two out")
        axes[str(name)] = _range(values, at) if isinstance(values, dict) else _values(values, at)
    return axes


def _values(values: Any, at: str) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise UsageError(f"{at}: must be a list of values, or a range such as {{low: 1e-6, high: 1e-4, log: true}}")
    texts = [as_text(_as_number(value)) for value in values]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise UsageError(f"{at}: {twice} is listed twice")
    return tuple(values)


def _as_number(value: Any) -> Any:
    """A number that YAML reads as text, such as 1e-5, as a number."""
    try:
        return float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value
    except (ValueError, OverflowError):
        return value


def _range(values: dict[Any, Any], at: str) -> Range:
    if unknown := [key for key in values if key not in ("low", "high", "log", "points")]:
        raise UsageError(f"{at}: a range has low, high, log and (for a grid) points, not {unknown[0]!r}")
    low, high = (_number(values.get(end), f"{at}: {end}") for end in ("low", "high"))
    log, points = values.get("log", False), values.get("points")
    if not isinstance(log, bool):
        raise UsageError(f"{at}: log must be true or false, got {log!r}")
    if not low < high:
        raise UsageError(f"{at}: low must be below high, got {low:g} and {high:g}")
    if log and low <= 0:
        raise UsageError(f"{at}: low must be above 0 where log is true, got {low:g}")
    whole = all(isinstance(values[end], int) for end in ("low", "high"))
    return Range(low, high, log, None if points is None else _whole(points, f"{at}: points", least=2), whole)


def _number(value: Any, at: str) -> float:
    try:
        number = float(value)  # YAML reads 1e-5 as text
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise UsageError(f"{at} must be a finite number, got {value!r}")
    return number


def _whole(value: Any, at: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{at} must be a whole number of at least {least}, got {value!r}")
    return value


# ---- the search ----------------------------------------------------------------------------------------------------


def _method(method: Any, axes: Mapping[str, Axis], where: str) -> str:
    if method not in METHODS:
        raise UsageError(f"{where}: method must be one of {_listed(METHODS)}, got {method!r}")
    for name, axis in axes.items():
        if method == "grid" and isinstance(axis, Range) and axis.points is None:
            raise UsageError(
                f"{where}: axes: {name}: a grid needs values: list them, add points: N to the range, or use method: "
                "tpe or random"
            )
    return str(method)


def _trials(section: Mapping[str, Any], method: str, axes: Mapping[str, Axis], where: str) -> int:
    if method == "grid":
        count = math.prod(len(axis.grid() if isinstance(axis, Range) else axis) for axis in axes.values())
        if count > _MOST_TRIALS:
            raise UsageError(f"{where}: the grid has {count} trials: use method: tpe or random, with trials: N")
        if section.get("trials", count) != count:
            raise UsageError(f"{where}: trials: the grid has {count}; leave trials out, or use method: random")
        return count
    if "trials" not in section:
        raise UsageError(f"{where}: method {method} needs trials: N, how many settings to try")
    return _whole(section["trials"], f"{where}: trials", least=1)


def _measures(section: Any, where: str) -> dict[str, str]:
    if isinstance(section, (str, list)):
        names = [section] if isinstance(section, str) else section
        section = {name: MEASURES[name].direction if name in MEASURES else None for name in names}
    if not isinstance(section, dict) or not section:
        raise UsageError(f"{where}: measures must be a mapping such as {{accuracy: maximize}}")
    for name, direction in section.items():
        if str(name).removeprefix("eval_") in _LOSS_VALUES or name in _LOSS_VALUES:
            raise UsageError(
                f"{where}: measures: {name} cannot compare trials: every loss has its own unit and its own minimum, "
                "and its hyperparameters scale it, so a lower value does not mean a better model. Use accuracy or "
                "margin, which are computed in the same way for every loss"
            )
        if name not in MEASURES:
            own = " Rewards are each loss's own, so they are no measures." if "rewards/" in str(name) else ""
            raise UsageError(f"{where}: measures: there is no measure {name!r}.{own} There are {_listed(MEASURES)}")
        if direction not in DIRECTIONS:
            raise UsageError(f"{where}: measures: {name} must be maximize or minimize, got {direction!r}")
    return dict(section)


def _prune(section: Mapping[str, Any], measures: Mapping[str, str], base: Mapping[str, Any], where: str) -> bool:
    prune = section.get("prune")
    if prune in (None, False, "none"):
        return False
    if prune != "median":
        raise UsageError(f"{where}: prune must be median or none, got {prune!r}")
    if "kl" in measures:
        raise UsageError(f"{where}: prune: cannot stop trials by their kl, which is smallest before any training")
    if len(measures) > 1:
        raise UsageError(f"{where}: prune: needs one measure, as several have no median; others are reported anyway")
    if base.get("eval_strategy", "no") not in ("steps", "epoch"):
        raise UsageError(f"{where}: prune: needs evaluations during training: add eval_strategy: steps and eval_steps")
    return True


def _seeds(section: Any, base: dict[str, Any], where: str) -> tuple[int, ...]:
    if section is None:
        return (_whole(base.pop("seed", 0), "seed", least=0),)
    if "seed" in base:
        raise UsageError(f"{where}: seeds: the base has a seed as well: leave it out")
    seeds = list(range(section)) if isinstance(section, int) and not isinstance(section, bool) else section
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise UsageError(f"{where}: seeds must be a number of seeds, or a list of different ones, got {section!r}")
    return tuple(_whole(seed, f"{where}: seeds:", least=0) for seed in seeds)


def _listed(names: Any) -> str:
    return ", ".join(names)


def shown(setting: Mapping[str, Any]) -> str:
    """A setting in one line: `loss=ipo(beta=0.1) learning_rate=1e-05`."""
    return " ".join(f"{name}={value_text(value)}" for name, value in setting.items()) or "the base"


def value_text(value: Any) -> str:
    """A value for people."""
    return f"{value:g}" if isinstance(value, float) else as_text(value)


def as_text(value: Any) -> str:
    """A value as text: itself, or JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def as_yaml(options: Mapping[str, Any]) -> str:
    """Options as a config file."""
    return yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True, width=10_000)
