"""The command in the model card is the one that was typed."""

from __future__ import annotations

import sys

import pytest

from prefopt.recipe.arguments.launched import launch_command

LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "TORCHELASTIC_RUN_ID",
             "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # fmt: skip
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("script", "original", "environment", "argv", "command"),
    [
        ("recipes/npo.py", ["python", "recipes/npo.py"], {}, None, "python recipes/npo.py --a 1"),
        ("/home/me/prefopt/recipes/npo.py", ["python"], {}, None, "python recipes/npo.py --a 1"),
        ("/somewhere/mine.py", ["python"], {}, None, "python mine.py --a 1"),
        ("mine.py", ["python", "mine.py"], ACCELERATE, None, "accelerate launch mine.py --a 1"),
        ("mine.py", ["python", "mine.py"], {**ACCELERATE, "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, None,
         "accelerate launch --num_processes 2 --use_fsdp mine.py --a 1"),
        ("mine.py", ["python"], {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, None,
         "torchrun --nproc_per_node 2 mine.py --a 1"),
        ("/x/own/train.py", ["python", "-m", "own.train", "--a", "1"], {}, None, "python -m own.train --a 1"),
        ("/usr/bin/prefopt", ["python", "/usr/bin/prefopt"], {}, ["--a", "1"], "prefopt demo --a 1"),
        ("/usr/bin/prefopt", ["python", "/usr/bin/prefopt"], {**ACCELERATE, "WORLD_SIZE": "2"}, ["--a", "1"],
         "accelerate launch --multi_gpu --num_processes 2 $(which prefopt) demo --a 1"),
        ("mine.py", ["python", "mine.py"], {}, ["--a", "1"], "python mine.py --a 1"),  # main(loss, sys.argv[1:])
        ("notebook.py", ["python"], {}, ["--b", "2"], None),  # words of a call in Python
        ("mine.py", ["python"], {}, [], None),
    ],
)  # fmt: skip
def test_the_command(monkeypatch, script, original, environment, argv, command):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = ["demo", "--a", "1"] if "prefopt" in script.rpartition("/")[2] else ["--a", "1"]
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "orig_argv", original)
    assert launch_command(argv) == command
