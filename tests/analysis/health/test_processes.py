"""Two processes stop together."""

from __future__ import annotations

import json

import pytest

from tests.processes import launch
from tests.recipe.test_recipe import arguments, pairs_file

pytestmark = pytest.mark.distributed


def test_two_processes_stop_at_the_same_step(tmp_path):
    words = [*arguments(tmp_path, pairs_file(tmp_path)), "--max_steps", "12", "--learning_rate", "1e-8"]
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from prefopt.recipe import main\n"
        "folder = Path(sys.argv.pop(1))\n"
        "results = main('dpo(beta=0.1)', [*sys.argv[1:], '--stop_on', 'learns_nothing'])\n"
        "import torch.distributed as dist\n"
        "(folder / f'rank-{dist.get_rank()}').write_text(results['stopped_by'])\n"
    )
    ended = launch([str(script), str(tmp_path), *words])
    assert ended.status == 0, ended.stderr[-3000:]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["learns_nothing"] * 2
    stored = json.loads((tmp_path / "out" / "log_history.json").read_text())
    assert stored["global_step"] == 5
