"""What each of the two processes of `test_two_processes.py` does."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from prefopt.losses import PreferenceBatch, Scores, parse
from prefopt.losses.base import ROLES
from tests.losses.cases import make_batch, random_rows, some_groups

WEIGHT = [1.0, 0.5, 0.0, 1.0, 2.0, 1.0]


def gradients_of(expression: str, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and for each example the sum of its gradients over every field, role after role."""
    loss = parse(expression).double()(batch).loss
    loss.backward()
    sums = []
    for role in ROLES:
        scores = batch.role(role)
        total = torch.zeros(len(scores), dtype=torch.float64)
        for part in fields(Scores):
            value = getattr(scores, part.name)
            if isinstance(value, torch.Tensor) and value.grad is not None:
                # Weighted by place, so that gradients of different tokens cannot make up for one another.
                place = torch.arange(1, value[0].numel() + 1, dtype=torch.float64)
                total += (value.grad.flatten(1) if value.dim() > 1 else value.grad.unsqueeze(1)) @ place
        if scores.group_sizes is not None:
            places = [place + 1.0 for size in scores.group_sizes for place in range(size)]
            place = torch.tensor(places, dtype=torch.float64)
            total = torch.zeros(len(scores.group_sizes), dtype=torch.float64).index_add(
                0, scores.groups, place * total
            )
        sums.append(total)
    return loss.detach(), torch.stack(sums)


def some(batch: PreferenceBatch, rows: slice) -> PreferenceBatch:
    """A batch with some of its examples, or none."""
    roles = {}
    for role in (*ROLES, "mismatched"):
        if role == "candidate":
            roles[role] = some_groups(batch.candidate, list(range(len(batch.chosen)))[rows])
        elif (scores := batch.role(role)) is not None:
            values = {part.name: getattr(scores, part.name) for part in fields(Scores) if part.name != "columns"}
            kept = {name: v[rows] if isinstance(v, torch.Tensor) else v for name, v in values.items()}
            roles[role] = Scores(**kept, columns={name: value[rows] for name, value in scores.columns.items()})
    return PreferenceBatch(**roles)


def state_after(expression: str, batch: PreferenceBatch) -> dict[str, float]:
    """The buffers of a loss after a batch."""
    loss = parse(expression).double()
    loss(batch)
    return {name: float(value) for name, value in loss.state_dict().items() if value.numel() == 1}


def shared_out(expression: str, rank: int, first: int) -> float:
    """The loss of the last batch of an evaluation, of which one process has `first` examples, the other the rest.

    Each process's mean counts by the number of its examples, as the trainer has it.
    """
    mine = slice(0, first) if rank == 0 else slice(first, 6)
    batch = some(make_batch(random_rows(6), weight=WEIGHT), mine)
    loss = parse(expression).double().eval()
    with torch.no_grad():
        total = loss(batch).loss * len(range(6)[mine])
    dist.all_reduce(total)
    return float(total) / 6


def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = random_rows(6)
    mine = slice(0, 3) if rank == 0 else slice(3, 6)
    results = {}
    for expression in json.loads((folder / "expressions.json").read_text()):
        batch = make_batch(rows[mine], weight=WEIGHT[mine], requires_grad=True)
        loss, gradients = gradients_of(expression, batch)
        everyone = [torch.zeros_like(gradients) for _ in range(2)]
        dist.all_gather(everyone, gradients)
        dist.all_reduce(loss)
        # DDP divides the sum of the processes' gradients by their number.
        results[expression] = {"loss": float(loss) / 2, "gradients": (torch.cat(everyone, dim=1) / 2).tolist()}
        results[expression]["state"] = state_after(expression, batch)
        results[expression]["uneven"] = [shared_out(expression, rank, first) for first in (4, 6)]
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    # Taking a gloo group down can deadlock with the interpreter's lock; everything is written by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
