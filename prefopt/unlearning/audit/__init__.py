"""What a high forget quality hides: attacks on an unlearned model, beside the same attacks on the gold model.

Forget quality compares answers to the questions as they were trained. These attacks ask in other ways: after a few
steps of training, with weights in 4 bits, many times, in other words.
"""

from prefopt.unlearning.audit.attack import Attack, Values, plain
from prefopt.unlearning.audit.quantization import Quantization, nf4_values, rounded_to_nf4
from prefopt.unlearning.audit.relearning import Relearning
from prefopt.unlearning.audit.sampling import Sampling
from prefopt.unlearning.audit.wording import Wording

__all__ = [
    "Attack", "Quantization", "Relearning", "Sampling", "Values", "Wording", "nf4_values", "plain", "rounded_to_nf4",
]  # fmt: skip
