"""One run of a recipe with every tracker, a push, and a canary in the place of every secret, for several tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.publishing.hub import Hub
from tests.recipe.test_recipe import arguments, pairs_file

ROOT = Path(__file__).parents[2]
TRACKERS = [name for name in ("tensorboard", "wandb", "trackio") if importlib.util.find_spec(name)]
LOSS = "dpo(beta=0.1) + 0.2*sft"

CANARIES = {
    "--hub_token": "hf_canaryOnTheCommandLine0123456789",
    "HF_TOKEN": "hf_canaryInTheEnvironment0123456789",
    "WANDB_API_KEY": "canaryOfTheTracker" + "0123456789abcdef" * 2,
    "proxy": "canary-pass-of-the-proxy",
    "git": "canary-pass-of-the-remote",
    "model": "canary-inside-of-model-init-kwargs",
}


@dataclass
class TrackedRun:
    """What a run left.

    Attributes:
        folder: it was started in; everything that it wrote is in there.
        shown: what it printed, warnings and errors included.
        hub: what was pushed.
    """

    folder: Path
    shown: str
    hub: Hub

    @property
    def out(self) -> Path:
        return self.folder / "out"


@pytest.fixture(scope="session")
def tracked_run(tmp_path_factory: pytest.TempPathFactory) -> TrackedRun:
    folder = tmp_path_factory.mktemp("tracked")
    if shutil.which("git"):
        # Trackers note where the code comes from.
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        address = f"https://someone:{CANARIES['git']}@example.com/repository.git"
        subprocess.run(["git", "-C", str(folder), "remote", "add", "origin", address], check=True)
    with Hub(token=CANARIES["--hub_token"]) as hub:
        environment = {
            **os.environ, **hub.environment, "HF_TOKEN": CANARIES["HF_TOKEN"], "HF_HOME": str(folder / "home"),
            "WANDB_API_KEY": CANARIES["WANDB_API_KEY"], "WANDB_MODE": "offline", "WANDB_DIR": str(folder),
            "WANDB_CONFIG_DIR": str(folder / "wandb-config"), "WANDB_CACHE_DIR": str(folder / "wandb-cache"),
            "TRACKIO_DIR": str(folder / "trackio"), "HTTPS_PROXY": f"http://someone:{CANARIES['proxy']}@127.0.0.1:9",
            "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", "COLUMNS": "300", "PREFOPT_VERBOSE": "1",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        config = folder / "run.yaml"  # the command line takes one tracker only
        config.write_text(yaml.safe_dump({"report_to": TRACKERS or "none"}))
        words = [
            *arguments(folder, pairs_file(folder)), "--loss", LOSS, "--learning_rate", "1e-2", "--use_peft",
            "--eval_strategy", "steps", "--eval_steps", "1", "--config", str(config),
            "--trackio_static_space_id", "false", "--push_to_hub", "--hub_model_id", "tester/tiny",
            "--hub_token", CANARIES["--hub_token"], "--model_init_kwargs", f'{{"token": "{CANARIES["model"]}"}}',
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(ROOT / "recipes" / "dpo.py"), *words],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return TrackedRun(folder, done.stdout + done.stderr, hub)
