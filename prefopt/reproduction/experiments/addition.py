"""Two-digit addition with a scratchpad: a task on which a tiny model can reason, be sampled and be checked.

"37+58=" is answered "15 09 095;": the ones' sum, the tens' sum with the carry, the answer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from prefopt.losses import SFT
from prefopt.reproduction.experiments.tiny_lm import Pairs, Rows, TinyLM, train, with_reference

SYMBOLS = "0123456789+= ;"
PROMPT, ANSWER = 6, 11


def encode(texts: list[str]) -> Tensor:
    return torch.tensor([[SYMBOLS.index(symbol) for symbol in text] for text in texts])


def question(a: int, b: int) -> str:
    return f"{a:02d}+{b:02d}="


def answer(a: int, b: int) -> str:
    ones = a % 10 + b % 10
    return f"{ones:02d} {a // 10 + b // 10 + ones // 10:02d} {a + b:03d}; "


def rows(prompts: Tensor, completions: Tensor) -> Rows:
    tokens = torch.cat([prompts, completions], 1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, PROMPT:-1] = True  # the last symbol pads
    return Rows(tokens, mask)


def shuffled_problems(seed: int = 0) -> list[tuple[int, int]]:
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(seed)).tolist()
    return [divmod(number, 100) for number in order]


PROBLEMS = shuffled_problems()
HELD_OUT = PROBLEMS[:500]
"""Problems for tests; training takes others."""


def prompts_of(problems: list[tuple[int, int]]) -> Tensor:
    return encode([question(a, b) for a, b in problems])


def is_right(completions: Tensor, problems: list[tuple[int, int]]) -> Tensor:
    """Whether the final answer is right; what the scratchpad says does not count."""
    return (completions[:, 6:10] == encode([answer(a, b) for a, b in problems])[:, 6:10]).all(-1)


def greedy_accuracy(model: TinyLM) -> float:
    completions = model.continue_rows(prompts_of(HELD_OUT), ANSWER)
    return float(is_right(completions, HELD_OUT).float().mean())


def sampled_accuracy(model: TinyLM, seed: int = 0, copies: int = 4) -> float:
    problems = HELD_OUT * copies
    generator = torch.Generator().manual_seed(seed)
    return float(is_right(model.continue_rows(prompts_of(problems), ANSWER, generator), problems).float().mean())


@cache
def base_model(enough: float = 0.3, seed: int = 0, most_rounds: int = 60) -> TinyLM:
    """Supervised on 2000 problems until `enough` of the sampled answers are right. Shared: train a copy of it."""
    problems = PROBLEMS[500:2500]
    known = rows(prompts_of(problems), encode([answer(a, b) for a, b in problems]))
    model = TinyLM(len(SYMBOLS), seed=seed)
    pairs = with_reference(model, known, known)
    for number in range(most_rounds):
        train(model, pairs, SFT(), lr=2e-3, steps=25, seed=number)
        if sampled_accuracy(model) >= enough:
            break
    return model


@dataclass(frozen=True)
class Draw:
    """Pairs from one model's samples, and how many of the prompts gave both right and wrong chains."""

    pairs: Pairs
    usable: int
    asked: int


def draw_pairs(
    model: TinyLM, problems: list[tuple[int, int]], chains: int, each: int, temperature: float, seed: int
) -> Draw:
    """`chains` samples a problem, and `each` pairs where some are right and some are not; the model is reference."""
    generator = torch.Generator().manual_seed(seed)
    prompts = prompts_of(problems).repeat_interleave(chains, 0)
    completions = model.continue_rows(prompts, ANSWER, generator, temperature)
    repeated = [problem for problem in problems for _ in range(chains)]
    right = is_right(completions, repeated).reshape(-1, chains)
    chosen: list[Tensor] = []
    rejected: list[Tensor] = []
    usable = 0
    for at, good in enumerate(right):
        yes, no = good.nonzero().squeeze(-1), (~good).nonzero().squeeze(-1)
        if not len(yes) or not len(no):
            continue
        usable += 1
        for side, pool in ((chosen, yes), (rejected, no)):
            side.append(at * chains + pool[torch.randint(len(pool), (each,), generator=generator)])
    w, l = torch.cat(chosen), torch.cat(rejected)  # noqa: E741
    pairs = with_reference(model, rows(prompts[w], completions[w]), rows(prompts[l], completions[l]))
    return Draw(pairs, usable, len(problems))


def copy_of(model: TinyLM) -> TinyLM:
    return copy.deepcopy(model)
