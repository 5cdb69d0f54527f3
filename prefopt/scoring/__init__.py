"""How log-probabilities are made: token scores from a model's logits, and rows grouped into a `PreferenceBatch`.

Works on any causal language model, wrapped or not. Imports `prefopt.losses` and torch, and transformers and PEFT for
access to their layers; never TRL.
"""

from prefopt.scoring.assemble import assemble_batch, extras_for
from prefopt.scoring.logprobs import TokenScores, token_scores
from prefopt.scoring.measure import Extras
from prefopt.scoring.padded import score_rows
from prefopt.scoring.rows import ROLES, RowBatch, RowGroups

__all__ = [
    "ROLES",
    "Extras",
    "RowBatch",
    "RowGroups",
    "TokenScores",
    "assemble_batch",
    "extras_for",
    "score_rows",
    "token_scores",
]
