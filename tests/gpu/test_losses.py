"""Every registered loss: a step in bfloat16 autocast on the device against float32 on the CPU."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.losses import Loss, Need, PreferenceBatch, parse
from prefopt.losses.scores import Role
from prefopt.scoring import ROLES, RowGroups, assemble_batch, extras_for, score_rows
from prefopt.scoring.measure import Extras
from tests.gpu.steps import relative
from tests.losses.cases import CASES

EXAMPLES = 6
WIDTH = 8
"""Length of embeddings that come with the data."""


@functools.cache
def rows(grouped: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor, RowGroups]:
    """For each example four candidates with scores, or rows of all other roles: chosen, rejected, two mismatched ones
    and a sampled one."""
    torch.manual_seed(0)
    kinds = [Role.CANDIDATE] * 4 if grouped else [Role.CHOSEN, Role.REJECTED, *[Role.MISMATCHED] * 2, Role.SAMPLED]
    # A group's rows follow one another.
    examples = torch.arange(EXAMPLES).repeat_interleave(4) if grouped else torch.arange(EXAMPLES).repeat(5)
    roles = torch.tensor(kinds).repeat(EXAMPLES) if grouped else torch.tensor(kinds).repeat_interleave(EXAMPLES)
    ids = torch.cat([torch.randint(3, 400, (EXAMPLES, 24))[examples], torch.randint(3, 400, (len(roles), 16))], dim=1)
    lengths = 24 + torch.randint(4, 17, (len(roles),))
    places = torch.arange(40)
    attention = (places < lengths[:, None]).long()
    mask = attention * (places >= 24)
    embeddings = {name: torch.randn(EXAMPLES, WIDTH) for name in
                  ("prompt_embedding", "chosen_embedding", "rejected_embedding")}  # fmt: skip
    scores = torch.randn(len(roles)) if grouped else None
    return (
        {"input_ids": ids, "attention_mask": attention},
        mask,
        RowGroups(roles, examples, {}, True, embeddings=embeddings, scores=scores),
    )


def on(groups: RowGroups, device: str, loss: Loss) -> RowGroups:
    """The groups on a device, with the columns that a loss reads."""
    columns = {name: torch.linspace(0.5, 1.5, EXAMPLES, device=device) for name in loss.columns}
    embeddings = {name: vectors.to(device) for name, vectors in groups.embeddings.items()}
    return RowGroups(
        groups.roles.to(device), groups.examples.to(device), columns, True, embeddings=embeddings,
        scores=None if groups.scores is None else groups.scores.to(device),
    )  # fmt: skip


def batch_of(loss: Loss, policy: Any, reference: Any, device: str) -> PreferenceBatch:
    inputs, mask, groups = rows(loss.grouped)
    inputs, mask = {name: value.to(device) for name, value in inputs.items()}, mask.to(device)
    extras = extras_for(loss)
    with torch.no_grad():
        states = Extras(layers=extras.layers if extras.beside_reference else ())
        theirs, _ = score_rows(reference, inputs, mask, extras=states, keep_logits=extras.full_reference)
    mine, _ = score_rows(policy, inputs, mask, extras=extras, reference=theirs if extras.full_reference else None)
    previous = theirs.logps.sum(-1) - 1.0 if Need.PREVIOUS in loss.needs else None
    return assemble_batch(
        on(groups, device, loss), mine, loss, theirs.logps, prev_logps=previous,
        ref_states=theirs.quantities.get("states"),
    )  # fmt: skip


def step(expression: str, policy: Any, reference: Any, device: str) -> tuple[float, torch.Tensor]:
    """Loss and gradient."""
    torch.manual_seed(0)  # some losses draw
    loss = parse(expression).to(device)
    policy.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=policy.computes_in_half):
        batch = batch_of(loss, policy, reference, device)
    value = loss(batch).loss
    value.backward()
    found = [p.grad.detach().float().cpu().flatten() for p in policy.parameters() if p.grad is not None]
    return float(value.detach()), torch.cat(found)


@pytest.fixture(scope="module")
def models(small_model, device) -> tuple[tuple[Any, Any, str], tuple[Any, Any, str]]:
    """Policy and reference: in float32 on the CPU, and the same for autocast on the device."""
    reference = AutoModelForCausalLM.from_pretrained(small_model).eval()
    policy = copy.deepcopy(reference)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0.0
    there = copy.deepcopy(policy).to(device), copy.deepcopy(reference).to(device), device
    policy.computes_in_half, there[0].computes_in_half = False, True
    return (policy, reference, "cpu"), there


@pytest.mark.parametrize("expression", [case.expression for case in CASES])
def test_a_step_in_bfloat16_is_the_step_in_float32(models, note, expression):
    exact, rounded = (step(expression, *where) for where in models)
    angle = torch.nn.functional.cosine_similarity(rounded[1], exact[1], dim=0)
    note("loss", [round(rounded[0], 5), round(exact[0], 5)])
    note("gradient", [round(float(angle), 4), round(relative(rounded[1], exact[1]), 4)])
    assert rounded[1].isfinite().all()
    # A penalty of 50 a nat makes a hundredth of a nat in a sum of log-probabilities a twentieth of the loss.
    assert rounded[0] == pytest.approx(exact[0], rel=0.05, abs=0.1)
    if float(exact[1].norm()) > 1e-6:  # else the loss is at its floor
        assert float(angle) > 0.95


def test_every_role_has_rows():
    assert {int(role) for grouped in (False, True) for role in rows(grouped)[2].roles} == set(range(len(ROLES)))
