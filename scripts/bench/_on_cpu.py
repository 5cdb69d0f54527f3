"""Runs a recipe as it is, on a CPU, under the engine that its arguments ask for; scripts/bench/engines.py starts it.

    torchrun --nproc_per_node 2 scripts/bench/_on_cpu.py recipes/dpo.py --fsdp
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 scripts/bench/_on_cpu.py recipes/dpo.py

On GPUs a recipe needs nothing like this. On a CPU accelerate leaves FSDP out without a word, and DeepSpeed compiles a
faster all-reduce first; both are seen to here, as in the tests.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.processes import fsdp_on_cpu, no_compiled_all_reduce  # noqa: E402

if __name__ == "__main__":
    recipe, *arguments = sys.argv[1:]
    if "--fsdp" in arguments or "ACCELERATE_USE_FSDP" in os.environ:
        fsdp_on_cpu()
    if "--deepspeed" in arguments or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        no_compiled_all_reduce()
    sys.argv = [recipe, *arguments]
    runpy.run_path(recipe, run_name="__main__")
    # Taking a gloo group down can deadlock with the interpreter's lock; everything is written by now.
    sys.stdout.flush()
    os._exit(0)
