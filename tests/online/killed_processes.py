"""A run of rounds on two processes, one of which is killed at an event.

python -m torch.distributed.run --nproc_per_node=2 -m tests.online.killed_processes RANK EVENT FOLDER OPTIONS...
EVENT 0 kills nobody. FOLDER gets a file with the number of events of each process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prefopt.online.run import main
from tests.online.test_rounds_killed import Bomb

if __name__ == "__main__":
    rank, event, folder, *argv = sys.argv[1:]
    mine = os.environ["RANK"]
    Bomb(Path(folder) / f"events-{mine}", int(event) if mine == rank else None).install()
    main(argv=argv)
