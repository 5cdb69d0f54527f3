"""The only package that knows TRL's trainer: `trl.DPOTrainer` with any objective of `prefopt.losses` in its place.

`config` holds the arguments, `mixin` the overridden methods, `scoring` how models are called, `state` what is kept
between steps and runs, `publishing` how folders are saved and pushed, `facts` what a model card says, `trackers` what
experiment trackers are told.
"""

from prefopt.trainer.config import PreferenceConfig, expression_from_trl_options
from prefopt.trainer.mixin import LossMixin, PreferenceTrainer

__all__ = ["LossMixin", "PreferenceConfig", "PreferenceTrainer", "expression_from_trl_options"]
