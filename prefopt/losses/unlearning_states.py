"""Unlearning in hidden states: those of the forget set are misdirected, those of the retain set stay where they were.

h_t is the policy's hidden state after one layer at the position that predicts token t, of H entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.losses.base import Loss
from prefopt.losses.checks import positive, whole
from prefopt.losses.needs import Need
from prefopt.losses.numerics import masked_mean
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch
from prefopt.losses.unlearning import ForgetLoss


@register("rmu")
class RMU(ForgetLoss):
    """Representation misdirection: hidden states of the forget set move to a random vector.

    loss = mean over a completion's tokens of |h_t - scale u|^2 / H
    u: a unit vector, entries uniform in [0, 1) before it is scaled to length 1

    Args:
        layer: whose output is steered, counted from 0; 7 in the paper for Zephyr-7B.
        scale: length of the vector, c in the paper; 6.5 there for Zephyr-7B, 2 in open-unlearning.
        seed: of the random direction, the same on every process and after a resume.

    Needs: hidden states after `layer` of the forget set; no reference. Add `rmu_retain` (preset `rmu_paper`).
    Limits: 0 where every state is the vector. The gradient of later layers is 0. The paper trains the MLP
        projections of layers 5 to 7 only, open-unlearning all parameters.
    open-unlearning takes the states at the completion's own tokens; here those that predict them count.
    Reference: Li et al. 2024, arXiv 2403.03218, section 4; as locuslab/open-unlearning, trainer/unlearn/rmu.py.
    """

    formula = "mean_t |h_t - c u|^2 / H on rejected completions, u a random direction"
    paper = "2403.03218"
    needs = Need.STATES

    def __init__(self, layer: int = 7, scale: float = 6.5, seed: int = 0):
        super().__init__()
        self.layer = whole("layer", layer)
        self.scale = positive("scale", scale)
        self.seed = whole("seed", seed)
        self.layers = (layer,)

    def vector(self, width: int) -> Tensor:
        """(width,) what hidden states of that width are moved to, in float64 on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        entries = torch.rand(width, generator=generator, dtype=torch.float64)
        direction: Tensor = entries / entries.norm()
        return self.scale * direction

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        scores = self.forget(batch)
        states = scores.states_after(self.layer)
        assert scores.token_mask is not None
        gap = states - self.vector(states.shape[-1]).to(states)
        return masked_mean(gap.square().mean(-1), scores.token_mask)


@register("rmu_retain")
class RMURetain(Loss):
    """RMU's retain term: hidden states of the retain set stay those of the frozen model.

    loss = mean over a completion's tokens of |h_t - h_t of the reference|^2 / H

    Args:
        layer: whose output is held, counted from 0; the one that `rmu` steers.

    Needs: hidden states after `layer` of policy and reference on the retain set.
    Limits: policy = reference gives 0. The paper weights it 1200 beside `rmu(scale=6.5)`.
    Reference: Li et al. 2024, arXiv 2403.03218, section 4; as locuslab/open-unlearning, trainer/unlearn/rmu.py
        (EMBED_DIFF).
    """

    formula = "mean_t |h_t - h_t of ref|^2 / H on chosen completions"
    paper = "2403.03218"
    needs = Need.STATES | Need.REFERENCE
    roles = ("chosen",)

    def __init__(self, layer: int = 7):
        super().__init__()
        self.layer = whole("layer", layer)
        self.layers = (layer,)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.chosen is not None
        assert batch.chosen.token_mask is not None
        gap = batch.chosen.states_after(self.layer) - batch.chosen.states_after(self.layer, of_reference=True)
        return masked_mean(gap.square().mean(-1), batch.chosen.token_mask)
