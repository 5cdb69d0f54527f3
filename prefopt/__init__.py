"""prefopt: preference optimization for language models.

`prefopt.losses` needs torch alone, so everything that needs TRL is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.trainer import LossMixin, PreferenceConfig, PreferenceTrainer

__version__ = "0.1.0"
__all__ = ["LossMixin", "PreferenceConfig", "PreferenceTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LossMixin", "PreferenceConfig", "PreferenceTrainer"):
        from prefopt.safety.imports import collector_paused

        with collector_paused():
            from prefopt import trainer
        return getattr(trainer, name)
    raise AttributeError(f"module 'prefopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
