"""The only package that knows TRL's trainer: `trl.DPOTrainer` with any objective of `prefopt.losses` in its place.

`config` holds the arguments, `mixin` the overridden methods, `scoring` how models are called, `budget` what is special
about steps in parts, `evaluation` about evaluations; `state` is what is kept between steps and runs, `engine` what a
run is spread over.
"""

from prefopt.trainer.config import PreferenceConfig, expression_from_trl_options
from prefopt.trainer.mixin import LossMixin, PreferenceTrainer

__all__ = ["LossMixin", "PreferenceConfig", "PreferenceTrainer", "expression_from_trl_options"]
