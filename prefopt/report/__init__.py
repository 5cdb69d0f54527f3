"""Reports about a run: its model card, its page, and the comparison of runs.

Reads facts and run folders; never imports a trainer.
"""

from prefopt.report.compare_page import compare_runs
from prefopt.report.run_page import write_run_page

__all__ = ["compare_runs", "write_run_page"]
