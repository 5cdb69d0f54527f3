"""Settings for the whole suite: the same on every machine, no network, no telemetry, caches that leave no trace."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import itertools
import os
import sys
import tempfile

# What a terminal, a scheduler, a CI or a person's account sets, and what would change what is tested.
FOREIGN = (
    "ACCELERATE_", "COMET_", "FSDP_", "HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LOCAL_", "MASTER_",
    "MLFLOW_", "PREFOPT_VERBOSE", "SLURM_", "TRACKIO_", "TRL_", "WANDB_",
    "COLORTERM", "FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR", "PY_COLORS", "TERMINAL_WIDTH", "TTY_",
)  # fmt: skip
for name in [name for name in os.environ if name.startswith(FOREIGN) or name in ("RANK", "WORLD_SIZE")]:
    del os.environ[name]

# Before any Hugging Face library is imported, since they read these once.
_CACHE = tempfile.TemporaryDirectory(prefix="prefopt-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    HF_DATASETS_CACHE=_CACHE.name,
    HF_TOKEN_PATH=f"{_CACHE.name}/no-token",
    MPLCONFIGDIR=f"{_CACHE.name}/matplotlib",
    # Waiting OpenMP threads sleep. By default they spin, which takes the cores from the other worker's threads.
    OMP_WAIT_POLICY="PASSIVE",
    # One terminal, whatever there is.
    COLUMNS="80",
    TERM="xterm-256color",
)
# The processor, whatever else there is, unless the tests for a GPU are asked for.
if not any(flag == "-m" and expression == "gpu" for flag, expression in itertools.pairwise(sys.argv)):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# The same examples on every machine, however long one takes there. `--hypothesis-profile=thorough` tries twenty-five
# times as many, and others each time.
_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)
settings.register_profile(
    "small", max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=_SLOW
)
settings.register_profile("thorough", settings.get_profile("small"), max_examples=1000, derandomize=False)
settings.load_profile("small")


@pytest.fixture(autouse=True, scope="session")
def _one_thread_a_worker():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def no_loss_stays(monkeypatch):
    """For a test that reads a file of losses: afterwards the registry is as it was."""
    from prefopt.losses import from_file as loader
    from prefopt.losses.registry import _LOSSES, _PRESETS

    losses, presets, modules = dict(_LOSSES), dict(_PRESETS), set(sys.modules)
    monkeypatch.setattr(loader, "_FILES", {})
    yield
    for registry, before in ((_LOSSES, losses), (_PRESETS, presets)):
        registry.clear()
        registry.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("loss_file_"):
            del sys.modules[name]


def pytest_collection_finish() -> None:
    """Leave out of every later garbage collection what has been imported, and read the metadata of a package once.

    Each trainer collects garbage as it starts, and looks for packages at every step: more work than a tiny model is.
    """
    gc.collect()
    gc.freeze()
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
