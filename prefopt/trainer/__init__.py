"""The only package that knows TRL's trainer: `trl.DPOTrainer` with any objective of `prefopt.losses` in its place.

`config` holds the arguments, `mixin` the overridden methods, `state` what an objective keeps between checkpoints.
"""

from prefopt.trainer.config import PreferenceConfig, expression_from_trl_options
from prefopt.trainer.mixin import LossMixin, PreferenceTrainer

__all__ = ["LossMixin", "PreferenceConfig", "PreferenceTrainer", "expression_from_trl_options"]
