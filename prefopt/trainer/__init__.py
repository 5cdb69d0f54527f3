"""The only package that knows TRL's trainer: `trl.DPOTrainer` with any objective of `prefopt.losses` in its place.

Each mixin of `mixin.LossMixin` is a file: `scoring` says how models are called, `budget` what is special about steps
in parts, `conflict` about sums without conflict, `evaluation` about evaluations, `finite` what ends a run, `saving`
how folders are written and gone on from, `publishing` how they are pushed. `config` holds the arguments;
`checkpoints`, `disk` and `stops` are what saving rests on, `state` what is kept between steps and runs, `learned` what
trains inside a loss, `facts` what a model card says, `trackers` what
trackers are told, `engine` what a run is spread over.
"""

from prefopt.trainer.config import PreferenceConfig, expression_from_trl_options
from prefopt.trainer.mixin import LossMixin, PreferenceTrainer

__all__ = ["LossMixin", "PreferenceConfig", "PreferenceTrainer", "expression_from_trl_options"]
