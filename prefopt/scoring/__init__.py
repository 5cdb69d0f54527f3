"""How log-probabilities are made: rows of token ids and models in, the `PreferenceBatch` of a loss out.

    collate = PreferenceCollator.for_loss(loss, tokenizer.pad_token_id)
    scorer = Scorer(loss, model, reference=reference)
    output = loss(scorer(collate(rows)))

Works on any causal language model, wrapped or not. Imports `prefopt.losses` and torch, and transformers and PEFT for
access to their layers; never TRL.
"""

from prefopt.scoring.assemble import assemble_batch, extras_for
from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.layout import Layout
from prefopt.scoring.logprobs import TokenScores, token_scores
from prefopt.scoring.measure import Extras
from prefopt.scoring.padded import score_rows
from prefopt.scoring.rows import ROLES, RowBatch, RowGroups
from prefopt.scoring.sampling import with_samples
from prefopt.scoring.scorer import Scored, Scorer

__all__ = [
    "ROLES",
    "Extras",
    "Layout",
    "PreferenceCollator",
    "RowBatch",
    "RowGroups",
    "Scored",
    "Scorer",
    "TokenScores",
    "assemble_batch",
    "extras_for",
    "score_rows",
    "token_scores",
    "with_samples",
]
