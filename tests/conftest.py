"""Settings for the whole suite: no network, no telemetry, caches that leave no trace, one thread a worker."""

from __future__ import annotations

import os
import tempfile

# Before any Hugging Face library is imported, since they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_CACHE = tempfile.TemporaryDirectory(prefix="prefopt-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# For tests/fuzz, whose examples take from a millisecond to half a second each. `--hypothesis-profile=thorough` makes
# twenty-five times as many.
_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)
settings.register_profile("small", max_examples=40, deadline=10_000, suppress_health_check=_SLOW)
settings.register_profile("thorough", settings.get_profile("small"), max_examples=1000)
settings.load_profile("small")


@pytest.fixture(autouse=True, scope="session")
def _one_thread_a_worker():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
