"""The only package that knows TRL's trainers: `trl.DPOTrainer` with any objective of `prefopt.losses` in its place.

trainer         `PreferenceTrainer`
mixin           `LossMixin`: the methods of TRL's trainer that are overridden
config          `PreferenceConfig`, and TRL's own loss options as a loss expression
setup           the constructor's arguments: bound to names, checked, completed
checks          what is refused before a model is loaded
options         options that are refused by name; models and images that cannot be trained on
overrides       what a subclass overrides around `LossMixin`
adapters        LoRA and the like while a trainer is set up
dropout         rates of dropout that are not modules
data            rows prepared for the objective
collator        the collator of a run on text
tokens          lengths of examples, and token ids that a model does not know
scoring         the `Scorer` of a trainer: its models, layout and cache
output_slot     how a step gets the objective's output for its batch
budget          `Parts`: batches cut to a budget of tokens
accumulation    micro-batches that know the mean size of a step's micro-batches
term_gradients  `TermGradients`: steps of `conflict_free`
learned         parameters inside the loss
start           checks of the first updates
first_batch     checks of the first batch
finite          `StepGuard`: stops where a loss or gradient is not finite
metrics         what is logged
evaluation      what counts in an evaluation
trackers        what is reported to TensorBoard, Weights & Biases and trackio
facts           what a model card says
publishing      `Publisher`: model cards and pushes
engine          processes and engine of a run, in words
saving/run      `Checkpoints`: saving, resuming, stopping
saving/         checkpoint folders, disk space, signals, state between runs, whole models
"""

from prefopt.trainer.config import PreferenceConfig, expression_from_trl_options
from prefopt.trainer.mixin import LossMixin
from prefopt.trainer.trainer import PreferenceTrainer

__all__ = ["LossMixin", "PreferenceConfig", "PreferenceTrainer", "expression_from_trl_options"]
