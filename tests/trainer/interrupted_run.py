"""A run that is killed while it writes its second file of cached log-probabilities; see `test_reference_cache.py`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from prefopt.scoring import cache
from tests.trainer.cache_processes import run

save_file = cache.save_file
files = 0


def save_half_of_the_second(tensors: dict[str, Any], path: Path) -> None:
    global files
    files += 1
    save_file(tensors, path)
    if files == 2:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    cache.WRITE_AFTER = 8
    cache.save_file = save_half_of_the_second
    run(Path(sys.argv[1]), "plain", "full", "kept", per_device_train_batch_size=4)
