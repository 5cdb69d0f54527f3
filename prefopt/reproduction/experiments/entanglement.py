"""Gradient entanglement (2410.13828): when a step on a margin moves both answers the same way."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.analysis import pushes
from prefopt.losses import (
    CPO,
    DPO,
    DPOP,
    HDPO,
    IPO,
    NPO,
    ORPO,
    RDPO,
    RRHF,
    SFT,
    SPPO,
    GradientAscent,
    Hinge,
    Loss,
    PairNormalized,
    PreferenceBatch,
    Scores,
    SimPO,
    presets,
)
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tiny_lm import Rows, TinyLM, sums

VOCABULARY = 20


def push(loss: Loss, pair: dict[str, float], lengths: tuple[int, int]) -> tuple[float, float]:
    """(d_w, d_l): how strongly a descent step on the loss raises log pi(w) and lowers log pi(l)."""
    values = {name: torch.tensor([value], dtype=torch.float64) for name, value in pair.items()}
    n_w, n_l = (torch.tensor([n]) for n in lengths)
    chosen, rejected = Scores(values["p_w"], n_w, values["r_w"]), Scores(values["p_l"], n_l, values["r_l"])
    up, down = pushes(loss, PreferenceBatch(chosen, rejected))
    return float(up), float(down)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def table() -> Outcome:
    """The pushes of each loss against the paper's table, written out by hand."""
    pair, (n_w, n_l) = {"p_w": -10.0, "p_l": -12.0, "r_w": -9.0, "r_l": -11.5}, (5, 8)
    u_w, u_l = pair["p_w"] - pair["r_w"], pair["p_l"] - pair["r_l"]
    d, a_w, a_l, b = u_w - u_l, pair["p_w"] / n_w, pair["p_l"] / n_l, 0.1
    dpo = b * sigmoid(-b * d)
    odds = [a - math.log1p(-math.exp(a)) for a in (a_w, a_l)]
    simpo = sigmoid(1.0 - 2.0 * (a_w - a_l))
    dpop = b * sigmoid(-b * (d - 5 * max(0.0, -u_w)))
    hdpo = 0.8 * b * sigmoid(-(0.8 * b * (pair["p_w"] - pair["p_l"]) - b * (pair["r_w"] - pair["r_l"])))
    rdpo, cpo = b * sigmoid(-(b * d + 0.01 * (n_w - n_l))), b * sigmoid(-b * (pair["p_w"] - pair["p_l"]))
    orpo = 0.1 * sigmoid(-(odds[0] - odds[1]))
    rows: list[tuple[str, Loss, float, float]] = [
        ("DPO", DPO(b), dpo, dpo),
        ("IPO (sum)", IPO(b, average=False), 2 * (5 - d), 2 * (5 - d)),
        ("hinge", Hinge(b), b, b),
        ("SimPO", SimPO(2.0, 1.0), 2 / n_w * simpo, 2 / n_l * simpo),
        ("CPO", presets()["cpo_paper"].build(b, 1.0), cpo + 1 / n_w, cpo),
        ("RRHF", RRHF() + SFT("mean"), (a_l > a_w) / n_w + 1 / n_w, (a_l > a_w) / n_l),
        ("DPOP", DPOP(b, 5.0), dpop * 6, dpop),
        (
            "ORPO",
            presets()["orpo_paper"].build(0.1),
            1 / n_w + orpo / (n_w * (1 - math.exp(a_w))),
            orpo / (n_l * (1 - math.exp(a_l))),
        ),
        ("SPPO", SPPO(b, "mean"), 5 - u_w, u_l + 5),
        ("H-DPO", HDPO(b, 0.8), hdpo, hdpo),
        ("R-DPO", RDPO(b, 0.01), rdpo, rdpo),
        ("RPO", presets()["rpo"].build(b, 0.005), b * (sigmoid(-b * d) + 0.005), dpo),
        ("IRPO", presets()["irpo"].build(b, 1.0), dpo + 1 / n_w, dpo),
        ("NPO", NPO(b), 0.0, 2 * sigmoid(b * u_l)),
        ("GA", GradientAscent("sum"), 0.0, 1.0),
    ]
    errors = {}
    for name, loss, up, down in rows:
        found = push(loss, pair, (n_w, n_l))
        errors[name] = max(abs(found[0] - up), abs(found[1] - down))
    return Outcome(
        "pushes",
        f"largest error over {', '.join(errors)}: {max(errors.values()):.1g} ({max(errors, key=errors.__getitem__)})",
        numbers={"error": [max(errors.values())]},
    )


# ------------------------------------------------------------------------------------- steps on a small language model


def tiny(seed: int) -> TinyLM:
    model = TinyLM(VOCABULARY, hidden=32, seed=seed).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # log-probabilities that differ from row to row
    return model


def pair_rows(generator: torch.Generator, lengths: tuple[int, int], shared: int = 0) -> tuple[Rows, Rows]:
    """Two completions of one prompt, of the given lengths; the last `shared` tokens are the same in both."""
    prompt = torch.randint(VOCABULARY, (1, 4), generator=generator)
    suffix = torch.randint(VOCABULARY, (1, shared), generator=generator)
    found = []
    for length in lengths:
        own = torch.randint(VOCABULARY, (1, length), generator=generator)
        tokens = torch.cat([prompt, own, suffix], 1)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, :4] = False
        found.append(Rows(tokens, mask))
    return found[0], found[1]


def gradient(model: TinyLM, value: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value.sum(), list(model.parameters()))])


def step_along(model: TinyLM, direction: Tensor, size: float) -> None:
    with torch.no_grad():
        at = 0
        for parameter in model.parameters():
            parameter.add_(size * direction[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()


LOSSES: dict[str, Loss] = {
    "DPO": DPO(0.1),
    "IPO (sum)": IPO(0.1, average=False),
    "SimPO": SimPO(),
    "CPO": CPO(0.1),
    "ORPO": ORPO(),
    "DPOP": DPOP(0.1, 5.0),
    "RPO": presets()["rpo"].build(0.1, 0.005),
    "IRPO": presets()["irpo"].build(),
}


def conditions(pairs: int = 200, lr: float = 1e-5) -> Outcome:
    agree: dict[str, list[bool]] = {name: [] for name in LOSSES}
    together = 0
    generator = torch.Generator().manual_seed(0)
    for number in range(pairs):
        model, reference = tiny(number), tiny(number + 1)
        shared = int(torch.randint(6, (1,), generator=generator))
        lengths = tuple(torch.randint(1, 5, (2,), generator=generator).tolist())
        w, l = pair_rows(generator, lengths, shared)  # noqa: E741
        with torch.no_grad():
            refs = sums(reference, w), sums(reference, l)
        p_w, p_l = sums(model, w), sums(model, l)
        g_w, g_l = gradient(model, p_w), gradient(model, p_l)
        pair = {"p_w": float(p_w.detach()), "p_l": float(p_l.detach()), "r_w": float(refs[0]), "r_l": float(refs[1])}
        for name, loss in LOSSES.items():
            # The conditions are the paper's; the step is along the loss's own gradient.
            d_w, d_l = push(loss, pair, (int(w.mask.sum()), int(l.mask.sum())))
            predicted = d_w * g_w @ g_w - d_l * g_w @ g_l, d_w * g_w @ g_l - d_l * g_l @ g_l
            chosen, rejected = (
                Scores(sums(model, r), r.mask.sum(1), ref) for r, ref in zip((w, l), refs, strict=True)
            )
            direction = -gradient(model, loss(PreferenceBatch(chosen, rejected)).loss)
            step_along(model, direction, lr)
            with torch.no_grad():
                moved = sums(model, w) - p_w, sums(model, l) - p_l
            step_along(model, direction, -lr)
            agree[name].append(all(float(m) * float(q) > 0 for m, q in zip(moved, predicted, strict=True)))
            together += name == "DPO" and float(moved[0] * moved[1]) > 0
    shares = {name: sum(values) / len(values) for name, values in agree.items()}
    return Outcome(
        "conditions",
        f"{pairs} pairs a loss, step {lr:g}: {'; '.join(f'{name} {share:.1%}' for name, share in shares.items())}. "
        f"Under DPO both moved the same way in {together / pairs:.0%} of the pairs",
        min(shares.values()) > 0.99,
        "untrained GRUs of 32 units in float64, random completions of 1 to 4 tokens and a shared suffix of 0 to 5",
    )


def suffixes(pairs: int = 300) -> list[Outcome]:
    found: dict[int, tuple[list[float], list[bool], list[bool]]] = {}
    for shared in (0, 3, 12):
        generator = torch.Generator().manual_seed(1)
        cosines, plain, normalised = [], [], []
        for number in range(pairs):
            model = tiny(number)
            w, l = pair_rows(generator, (1, 1), shared)  # noqa: E741
            g_w, g_l = gradient(model, sums(model, w)), gradient(model, sums(model, l))
            if torch.equal(w.tokens, l.tokens):
                continue
            cosines.append(float(F.cosine_similarity(g_w, g_l, dim=0)))
            cross = g_w @ g_l
            plain.append(bool(g_w @ g_w > cross and g_l @ g_l > cross))
            chosen, rejected = (Scores(p := sums(model, r), r.mask.sum(1), p.detach()) for r in (w, l))
            pair = PreferenceBatch(chosen, rejected)
            direction = -gradient(model, PairNormalized(DPO(0.1)).normalized(pair, model.parameters()).loss)
            normalised.append(bool(direction @ g_w > 0 and direction @ g_l < 0))
        found[shared] = cosines, plain, normalised
    mean = {shared: sum(c) / len(c) for shared, (c, _, _) in found.items()}
    right = {shared: sum(p) / len(p) for shared, (_, p, _) in found.items()}
    normal = {shared: sum(n) / len(n) for shared, (_, _, n) in found.items()}
    settings = (
        "untrained GRUs of 32 units; answers that differ in one token, before a shared suffix of 0, 3, 12 tokens"
    )
    return [
        Outcome(
            "suffix-cosine",
            "mean cosine: " + "; ".join(f"{shared} shared tokens {value:.3f}" for shared, value in mean.items()),
            mean[0] < mean[3] < mean[12],
            settings,
            picture=Picture(
                "alignment of the two answers' gradients",
                "shared tokens at the end",
                "mean cosine",
                {"untrained GRU": [(float(shared), value) for shared, value in mean.items()]},
            ),
        ),
        Outcome(
            "normalised-steps",
            f"with 0, 3, 12 shared tokens: DPO {', '.join(f'{v:.0%}' for v in right.values())}; normalised "
            f"{', '.join(f'{v:.0%}' for v in normal.values())}",
            min(normal.values()) >= 0.99 and right[12] < normal[12],
            f"{settings}; the normalised step is that of pair_normalized(dpo(beta=0.1))",
        ),
    ]
