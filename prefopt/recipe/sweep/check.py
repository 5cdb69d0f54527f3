"""Every setting of a sweep is checked before the first one trains: options, losses, model, rows."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

from prefopt.recipe.sweep.plan import SweepPlan, as_yaml, shown
from prefopt.recipe.sweep.trial import prepare
from prefopt.safety.errors import PrefoptError, UsageError
from prefopt.safety.files import write_text

MOST = 8
"""Settings that a message names."""


def check_settings(plan: SweepPlan) -> None:
    """Dry run of every setting of a grid; of a search, of every value and both ends of every range.

    Raises:
        UsageError: naming each setting that cannot be trained, and why.
    """
    settings, wrong = plan.settings_to_check(), []
    for setting in settings:
        if message := _refusal(plan, setting):
            wrong.append(f"{shown(setting)}: {message}")
    if wrong:
        more = [f"and {len(wrong) - MOST} more"] if len(wrong) > MOST else []
        lines = "\n  ".join([*wrong[:MOST], *more])
        raise UsageError(
            f"{len(wrong)} of {len(settings)} settings in {plan.source} cannot be trained, so none was:\n  {lines}"
        )


def _refusal(plan: SweepPlan, setting: dict[str, object]) -> str:
    """Why a setting cannot be trained; empty if it can."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        config = Path(scratch) / "config.yaml"
        write_text(config, as_yaml(plan.options(setting, plan.seeds[0])))
        try:
            prepare(config, plan.folder, plan.folder, ("--dry_run", "true"))
        except SystemExit as error:
            return str(error.code).replace(str(config), str(plan.source))
        except (PrefoptError, OSError) as error:
            return str(error)
        except Exception as error:
            if getattr(error, "for_users", False):
                return str(error)
            raise
    return ""
