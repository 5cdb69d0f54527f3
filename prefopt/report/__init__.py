"""Reports about a run: its model card, its page, and the comparison of runs.

Reads facts and run folders; never imports a trainer. A page is imported at its first use: `prefopt.report.folder`
alone needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.report.compare_page import compare_runs
    from prefopt.report.run_page import write_run_page

__all__ = ["compare_runs", "write_run_page"]

_MODULES = {"compare_runs": "compare_page", "write_run_page": "run_page"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
