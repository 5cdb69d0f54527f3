"""Do verdicts of gradient entanglement predict which way held-out answers move in the next steps?

    python scripts/bench/entanglement.py                # on the bundled pairs
    python scripts/bench/entanglement.py --data FILE    # on others, such as HH's (jsonl, may be gzipped)

The bundled 135M model with a fresh adapter measures 16 held-out pairs once. Then it makes three steps of two other
pairs with each loss, always from the same start, with the optimizer of the bundled job (AdamW, 1e-4). Three
predictions of the sign of the change of each held-out log-probability are compared with what happened:

    own      the paper's two conditions: the effect of a step on the pair itself
    others   the mean effect of a step on each of the other held-out pairs, from the same gradients
    loss     what the loss wants: chosen up, rejected down

and the share of right ones with what independent guesses of as many ups and downs would have. Intervals are bootstraps
over pairs, which all losses share.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.analysis.gradients.push import pushes
from prefopt.data import read_preferences, tokenize_dataset
from prefopt.demo.data import load_demo
from prefopt.losses import Loss, parse
from prefopt.losses.scores import REFERENCE_LOGPS, Role
from prefopt.models.bundled import resolve_demo_model
from prefopt.safety.files import write_text
from prefopt.scoring import PreferenceCollator, RowBatch, Scorer

LOSSES = (
    "dpo(beta=0.1)", "ipo(beta=0.1)", "simpo(beta=2.0, gamma=1.0)", "orpo", "dpo(beta=0.1) + 0.2*sft",
    "dpo_shift(beta=0.1, shift=0.55)",
)  # fmt: skip
LEARNING_RATE = 1e-4
LONGEST = 128
"""Tokens of a row; longer ones are left out, to save time."""
DRAWS = 2000
ROLES = (Role.CHOSEN, Role.REJECTED)

Rows = list[dict[str, Any]]


def pairs_of(data: Any, tokenizer: Any, seed: int = 0) -> Rows:
    """Tokenized pairs that are short enough, in random order."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: row[name] for name in names} for row in tokenize_dataset(data, tokenizer)]
    short = [r for r in rows if len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) <= LONGEST]
    random.Random(seed).shuffle(short)
    return short


class Start:
    """A model with a fresh adapter, to which it returns before each loss."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.model.eval()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._begin = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._scorer = Scorer(parse("dpo"), self.model)

    def back(self) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self._begin[name])

    def score(self, loss: Loss, rows: RowBatch) -> Any:
        self._scorer.loss = loss
        return self._scorer(rows, every_role=True)

    def batch(self, rows: Rows) -> RowBatch:
        return RowBatch.of(PreferenceCollator.for_loss(None, self.tokenizer.pad_token_id or 0)(rows))

    def with_reference(self, rows: Rows) -> Rows:
        """The rows with their log-probabilities before training, which are the reference's."""
        with torch.no_grad():
            scored = self.score(parse("simpo"), self.batch(rows))
        logps = zip(scored.chosen.logps.tolist(), scored.rejected.logps.tolist(), strict=True)
        return [row | dict(zip(REFERENCE_LOGPS, pair, strict=True)) for row, pair in zip(rows, logps, strict=True)]

    def gradients(self, rows: RowBatch) -> Tensor:
        """(2, N, P) of the log-probability of each chosen and each rejected answer."""
        found = []
        for role in ROLES:
            for example in range(rows.example_count):
                one = rows.select_rows((rows.examples == example) & (rows.roles == role))
                logp = self._scorer.layout.score(self.model, one)[0].logps.sum()
                parts = torch.autograd.grad(logp, list(self.trained.values()))
                found.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(found).reshape(2, rows.example_count, -1)

    def train(self, loss: Loss, rows: Rows, steps: int) -> None:
        optimizer = torch.optim.AdamW(self.trained.values(), lr=LEARNING_RATE, weight_decay=0.0)
        for step in range(steps):
            value = loss(self.score(loss, self.batch(rows[step::steps]))).loss
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            optimizer.step()


def predicted(gram: Tensor, d_w: Tensor, d_l: Tensor) -> dict[str, Tensor]:
    """(2, N) changes of the chosen and rejected log-probabilities by a step on the own pair and on the other pairs.

    Args:
        gram: (2, N, 2, N) inner products of all gradients.
        d_w, d_l: (N,) pushes of the loss.
    """
    by_pair = gram[:, :, 0] * d_w - gram[:, :, 1] * d_l  # (2, N, N): of each answer, by each pair's step
    own = by_pair.diagonal(dim1=1, dim2=2)
    return {"own": own, "others": (by_pair.sum(-1) - own) / (by_pair.shape[-1] - 1)}


def measure(start: Start, rows: Rows, probes: int, steps: int, batch_size: int) -> dict[str, Any]:
    """Predictions and changes of each loss on one set."""
    start.back()
    rows = start.with_reference(rows[: probes + steps * batch_size])
    held_out, trained = rows[:probes], rows[probes:]
    batch = start.batch(held_out)
    gradients = start.gradients(batch)
    flat = gradients.flatten(0, 1)
    gram = (flat @ flat.T).double().reshape(2, probes, 2, probes)
    with torch.no_grad():
        before = start.score(parse("dpo"), batch)  # every loss here reads sums, lengths and the reference's sums
    runs = {}
    for expression in LOSSES:
        loss = parse(expression)
        start.back()
        d_w, d_l = pushes(loss, before)
        start.train(copy.deepcopy(loss), trained, steps)
        with torch.no_grad():
            after = start.score(loss, batch)
        moved = torch.stack([(getattr(after, r.field).logps - getattr(before, r.field).logps).double() for r in ROLES])
        guesses = {name: change.tolist() for name, change in predicted(gram, d_w, d_l).items()}
        runs[expression] = {**guesses, "moved": moved.tolist()}
        chosen, rejected = moved.mean(-1).tolist()
        print(f"{expression}: chosen moved by {chosen:+.2f} nats, rejected by {rejected:+.2f}", flush=True)
    own = gram.diagonal(dim1=1, dim2=3)  # (2, 2, N)
    return {
        "inner": own[0, 1].tolist(),
        "chosen_norm": own[0, 0].sqrt().tolist(),
        "rejected_norm": own[1, 1].sqrt().tolist(),
        "runs": runs,
    }


# ---- rates ----------------------------------------------------------------------------------------------------------


def rates(runs: Sequence[dict[str, Any]], which: str, role: int, pairs: Sequence[int]) -> tuple[float, float]:
    """The share of right signs over losses and pairs, and what independent guesses would have, a mean over losses."""
    right, chance = 0.0, 0.0
    for run in runs:
        up = [run["moved"][role][pair] > 0 for pair in pairs]
        guess = [role == 0] * len(pairs) if which == "loss" else [run[which][role][pair] > 0 for pair in pairs]
        right += sum(a == b for a, b in zip(up, guess, strict=True)) / len(pairs)
        p, q = sum(up) / len(pairs), sum(guess) / len(pairs)
        chance += p * q + (1 - p) * (1 - q)
    return right / len(runs), chance / len(runs)


def with_intervals(runs: Sequence[dict[str, Any]], which: str, role: int) -> dict[str, Any]:
    """Both rates and their difference, with 95% bootstrap intervals over pairs."""
    count, rng = len(runs[0]["moved"][0]), random.Random(0)
    right, chance = rates(runs, which, role, range(count))
    draws = [rates(runs, which, role, rng.choices(range(count), k=count)) for _ in range(DRAWS)]

    def middle(values: list[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered[int(0.025 * DRAWS)], ordered[int(0.975 * DRAWS) - 1]]

    return {
        "right": right,
        "interval": middle([one for one, _ in draws]),
        "chance": chance,
        "above_chance": middle([one - other for one, other in draws]),
    }


def report(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Print the rates of one set, and return them."""
    inner, w_norm, l_norm = (result[key] for key in ("inner", "chosen_norm", "rejected_norm"))
    count = len(inner)
    shares = {
        "inner product above 0": sum(value > 0 for value in inner) / count,
        "inner product below |g_l|^2": sum(v < n**2 for v, n in zip(inner, l_norm, strict=True)) / count,
        "inner product below |g_w|^2": sum(v < n**2 for v, n in zip(inner, w_norm, strict=True)) / count,
    }
    print(f"{name}, {count} pairs: " + "; ".join(f"{what} in {share:.0%}" for what, share in shares.items()))
    table: dict[str, Any] = {}
    for role in ROLES:
        for which in ("own", "others", "loss"):
            cell = with_intervals(list(result["runs"].values()), which, role)
            table[f"{role.field}, {which}"] = cell
            low, high = cell["interval"]
            print(
                f"  {role.field:8} {which:6} right {cell['right']:.0%} ({low:.0%} to {high:.0%}), by chance "
                f"{cell['chance']:.0%}, above it by {cell['above_chance'][0]:+.0%} to {cell['above_chance'][1]:+.0%}"
            )
    return {"shares": shares, "rates": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    parser.add_argument("--data", help="a file of pairs in place of the bundled ones")
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2, help="pairs a step")
    options = parser.parse_args()
    start = Start(resolve_demo_model())
    data = load_demo("train") if options.data is None else read_preferences(options.data)
    measured = measure(start, pairs_of(data, start.tokenizer), options.probes, options.steps, options.batch)
    result = measured | report(options.data or "the bundled pairs", measured)
    if options.out:
        write_text(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
