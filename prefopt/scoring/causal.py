"""Whether a model's tokens see what comes after them, found out by changing the last token of a row.

BERT without `is_decoder` and XLNet are loaded as language models and give logits, but not those of the next token.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from prefopt.scoring.exact import called_so, undisturbed, ways_to_call
from prefopt.scoring.fingerprint import is_sharded
from prefopt.scoring.model import peeled
from prefopt.scoring.rows import RowBatch
from prefopt.scoring.trial import ERRORS, EXACT

TOKENS = 32
"""Length of the row: the fewer tokens there are, the more each of them weighs."""
ROUGH = 0.02
"""The relative difference of logits that tells where weights cannot be cast to float32."""


def looks_ahead(model: nn.Module, batch: RowBatch) -> float:
    """How much a row's logits differ when a later token does, as a share of their length; 0 for a causal model.

    Args:
        model: wrapped or not. Processes that share its weights must call this together.
        batch: whose first row is used.
    """
    row = batch.ids[0][batch.attention[0].bool()][:TOKENS]
    others = batch.ids[batch.ids != row[-1]]
    if len(row) < 2 or not len(others):
        return 0.0
    rows = torch.stack([row, row])
    rows[1, -1] = others[0]
    called = model if is_sharded(model) else peeled(model)
    with undisturbed(called):
        for way in ways_to_call(called):
            # An error here also occurs in the run, or has nothing to do with the order of tokens.
            with contextlib.suppress(*ERRORS):
                with called_so(called, way):
                    logits = called(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
                gap = _typical_gap(logits[:, -len(row) : -1].float())
                return gap if gap > (ROUGH if way is None else EXACT) else 0.0
    return 0.0


def _typical_gap(logits: Tensor) -> float:
    """Of the (2, T, V) logits of two rows; the median, as a router's choice may hang on rounding here and there."""
    gaps = (logits[0] - logits[1]).norm(dim=-1) / logits[0].norm(dim=-1).clamp(min=1e-30)
    return float(gaps.median())
