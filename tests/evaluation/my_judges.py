"""Judges for the tests, named as module:function."""

import math
import os
import signal

import torch

CALLS: list[str] = []


def length(text):
    CALLS.append(text)
    return len(text)


def sometimes(completion: str, answer: str = "none") -> float | None:
    CALLS.append(completion)
    if "raise" in completion:
        raise RuntimeError("no idea")
    if "nan" in completion:
        return math.nan
    return None if "abstain" in completion else float(completion == answer)


def with_row(prompt, completion, row, level):
    return level + row["level"] + len(prompt)


def shorter(first: str, second: str) -> str:
    return "first" if len(first) < len(second) else "second" if len(second) < len(first) else "tie"


def shown_first(first, second):
    return 0.75


def kill_at_b7(completion):
    CALLS.append(completion)
    if completion == "b7" and os.environ.get("KILL_AT_B7"):
        os.kill(os.getpid(), signal.SIGKILL)
    return len(completion)


def two_of_three(a, b, c):
    return a


def takes_out(completion, row):
    return torch.tensor(float(row.pop("answer")), requires_grad=True)


def fails(completion):
    raise RuntimeError("never")


def not_of_one(prompt, completion):
    if prompt.startswith("1"):
        raise ValueError("one")
    return 1.0
