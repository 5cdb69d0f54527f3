"""One row per registered loss: expressions to try, and an independent formula for each in plain Python floats.

The formulas are written out again here, with `math` alone, so that a slip in a loss cannot hide in shared code. Losses
whose examples act on one another have a formula over the whole batch instead of one per row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, variance

import torch

from prefopt.losses import PreferenceBatch, Scores
from prefopt.losses.numerics import numbered_generator


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def odds(a: float) -> float:
    return a - math.log(-math.expm1(a))


def odds_of_rows(true: str, false: str, *log_probabilities: float) -> float:
    """Log of the odds that independent propositions fall on a row of `true` rather than on one of `false`."""

    def count(rows: str) -> float:
        chances = [math.exp(a) for a in log_probabilities]
        return sum(
            math.prod(p if digit == "1" else 1 - p for p, digit in zip(chances, row, strict=True))
            for row in rows.split(",")
        )

    return math.log(count(true)) - math.log(count(false))


@dataclass(frozen=True)
class Tokens:
    """What is known about the tokens of one completion besides their sum; plain numbers."""

    logps: tuple[float, ...]
    ref_logps: tuple[float, ...]
    collision: tuple[float, ...]
    forward_kl: tuple[float, ...]
    reverse_kl: tuple[float, ...]
    ref_entropy: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    """The likeliest tokens of each position, as (token, log-probability), best first."""
    ids: tuple[int, ...]
    divergences: tuple[tuple[float, ...], ...]
    """At each position one value for each of `DIVERGENCES`."""
    hidden: tuple[float, ...]
    prompt_hidden: tuple[float, ...]
    embedding: tuple[float, ...]
    prompt_embedding: tuple[float, ...]
    others: tuple[float, ...]
    """Log-probability of all tokens but the completion's."""
    peak: tuple[float, ...]
    """The largest logit less the mean logit."""
    states: tuple[tuple[tuple[float, ...], ...], ...]
    """At each position a vector for each of `LAYERS`."""
    ref_states: tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class Row:
    """One pair as plain numbers; `z0` is what the mismatched completions of the batch average to."""

    pw: float
    pl: float
    rw: float
    rl: float
    nw: int
    nl: int
    z0: float = 0.0
    margin: float = 0.0
    forget: float = 1.0
    qw: float | None = None
    ql: float | None = None
    """Sums under the previous iterate; the reference's if None."""
    ps: float = -7.0
    rs: float = -7.5
    """Policy and reference sums of a sampled completion."""
    sw: float = 1.0
    sl: float = 0.0
    """Scores of the two completions."""
    from_reference: float = 0.0
    """1 where the chosen completion was drawn from the reference, 0 where the rejected one was."""

    @property
    def uw(self) -> float:
        return self.pw - self.rw

    @property
    def ul(self) -> float:
        return self.pl - self.rl

    @property
    def aw(self) -> float:
        return self.pw / self.nw

    @property
    def al(self) -> float:
        return self.pl / self.nl

    @property
    def d(self) -> float:
        return self.uw - self.ul

    @property
    def per_token(self) -> float:
        return self.uw / self.nw - self.ul / self.nl

    @property
    def group(self) -> list[tuple[float, float, float, int]]:
        """Completions of one prompt as (policy sum, reference sum, score, length): two, three or four."""
        more = [(self.ps, self.rs, (self.sw + 2 * self.sl) / 3, 3), (self.ps - 1, self.rs + 1, self.sl - 0.25, 6)]
        return [(self.pw, self.rw, self.sw, self.nw), (self.pl, self.rl, self.sl, self.nl), *more[: self.nw % 3]]

    @property
    def w(self) -> Tokens:
        return make_tokens(self.pw, self.rw, self.nw)

    @property
    def l(self) -> Tokens:  # noqa: E743
        return make_tokens(self.pl, self.rl, self.nl)


VOCABULARY = 12
TOP = 7
WIDTH = 5
LAYERS = (1, 0, 7)
DIVERGENCES = ("kl", "js", "hellinger", "renyi(0.9)", "renyi(2.0)", "bhattacharyya", "wasserstein", "f(triangular)")


def make_tokens(policy_sum: float, reference_sum: float, n: int) -> Tokens:
    """Token values that add up to the sums; a function of the arguments alone."""
    draw = random.Random(f"{policy_sum:.9f} {reference_sum:.9f} {n}")

    def split(total: float) -> tuple[float, ...]:
        parts = [draw.uniform(0.5, 1.5) for _ in range(n)]
        return tuple(total * part / sum(parts) for part in parts)

    logps = split(policy_sum)
    ids = tuple(draw.randrange(VOCABULARY) for _ in range(n))
    top = []
    for t in range(n):
        tokens = draw.sample(range(VOCABULARY), TOP)
        values = sorted((-draw.uniform(0.1, 6.0) for _ in tokens), reverse=True)
        top.append(tuple((i, logps[t] if i == ids[t] else v) for i, v in zip(tokens, values, strict=True)))
    # Vectors have draws of their own, so that what came before them stays what it was.
    of_vectors = random.Random(f"vectors {policy_sum:.9f} {reference_sum:.9f} {n}")
    vectors = [tuple(of_vectors.gauss(0.5, 1.0) for _ in range(WIDTH)) for _ in range(4)]
    divergences = tuple(tuple(of_vectors.uniform(0.0, 0.4) for _ in DIVERGENCES) for _ in range(n))
    of_logits = random.Random(f"logits {policy_sum:.9f} {reference_sum:.9f} {n}")
    return Tokens(
        logps,
        split(reference_sum),
        tuple(-draw.uniform(0.1, 3.0) for _ in range(n)),
        tuple(draw.uniform(0.0, 0.4) for _ in range(n)),
        tuple(draw.uniform(0.0, 0.4) for _ in range(n)),
        tuple(draw.uniform(0.5, 3.0) for _ in range(n)),
        tuple(top),
        ids,
        divergences,
        *vectors,
        tuple(-of_logits.uniform(0.01, 3.0) for _ in range(n)),
        tuple(of_logits.uniform(1.0, 12.0) for _ in range(n)),
        *(
            tuple(tuple(tuple(of_logits.gauss(0.5, 1.0) for _ in range(WIDTH)) for _ in LAYERS) for _ in range(n))
            for _ in range(2)
        ),
    )


@dataclass(frozen=True)
class Case:
    """An expression, its value for each role of a row in order, and what section 9's reference vector gives."""

    expression: str
    values: Callable[[Row], tuple[float, ...]] | None = None
    at_reference_vector: float | None = None
    """Sum of the values at pw=-10, pl=-12, rw=-11, rl=-11.5, nw=5, nl=8 (z0=0.3 where one is used), from a table of
    the literature's formulas; None for losses that are not in it."""
    at_equality: float | None = None
    """Each value where policy and reference agree (pw=rw, pl=rl); None where it depends on the log-probabilities."""
    batch_values: Callable[[Sequence[Row]], list[float]] | None = None
    """All values of a batch in order, for losses whose examples act on one another."""
    held: bool = False
    """Whether the objective stops gradients on purpose, so that its gradient is not the slope of its value."""

    def expected(self, rows: Sequence[Row]) -> list[float]:
        if self.batch_values is not None:
            return self.batch_values(rows)
        assert self.values is not None
        by_role = list(zip(*(self.values(row) for row in rows), strict=True))
        return [value for role in by_role for value in role]


REFERENCE_VECTOR = Row(pw=-10, pl=-12, rw=-11, rl=-11.5, nw=5, nl=8, z0=0.3)


def make_scores(
    sums: Sequence[tuple[float, float, float, int]],
    columns: dict[str, list[float]],
    dtype: torch.dtype,
    requires_grad: bool,
) -> Scores:
    """Scores of completions given as (policy sum, reference sum, previous sum, length)."""

    def tensor(values: object, grad: bool = False) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, requires_grad=grad)

    width = max((n for *_, n in sums), default=1)
    tokens = [make_tokens(p, r, n) for p, r, _, n in sums]

    def padded(name: str, grad: bool = False) -> torch.Tensor:
        rows = [[*getattr(one, name), *[0.0] * (width - len(one.ids))] for one in tokens]
        return tensor(rows, grad)

    blank = ((0, 0.0),) * TOP
    tops = [[*one.top, *[blank] * (width - len(one.ids))] for one in tokens]
    ids = [[*one.ids, *[0] * (width - len(one.ids))] for one in tokens]
    none = (0.0,) * len(DIVERGENCES)
    no_states = ((0.0,) * WIDTH,) * len(LAYERS)
    states, ref_states = (
        [[*getattr(one, name), *[no_states] * (width - len(one.ids))] for one in tokens]
        for name in ("states", "ref_states")
    )
    divergences = [[*one.divergences, *[none] * (width - len(one.ids))] for one in tokens]
    return Scores(
        logps=tensor([p for p, *_ in sums], requires_grad),
        lengths=torch.tensor([n for *_, n in sums]),
        ref_logps=tensor([r for _, r, *_ in sums]),
        prev_logps=tensor([q for _, _, q, _ in sums]),
        token_logps=padded("logps", requires_grad),
        token_mask=torch.tensor([[t < n for t in range(width)] for *_, n in sums], dtype=torch.bool),
        ref_token_logps=padded("ref_logps"),
        token_ids=torch.tensor(ids),
        top_logps=tensor([[[v for _, v in place] for place in row] for row in tops], requires_grad),
        top_ids=torch.tensor([[[i for i, _ in place] for place in row] for row in tops]),
        token_collision=padded("collision"),
        token_others=padded("others", requires_grad),
        token_peak=padded("peak", requires_grad),
        token_forward_kl=padded("forward_kl", requires_grad),
        ref_token_entropy=padded("ref_entropy"),
        token_reverse_kl=padded("reverse_kl", requires_grad),
        token_divergences=tensor(divergences, requires_grad),
        divergences=DIVERGENCES,
        hidden=tensor([one.hidden for one in tokens], requires_grad),
        prompt_hidden=tensor([one.prompt_hidden for one in tokens], requires_grad),
        states=tensor(states, requires_grad),
        layers=LAYERS,
        ref_states=tensor(ref_states),
        embedding=tensor([one.embedding for one in tokens]),
        prompt_embedding=tensor([one.prompt_embedding for one in tokens]),
        columns={name: tensor(values) for name, values in columns.items()},
    )


def make_batch(
    rows: Sequence[Row],
    dtype: torch.dtype = torch.float64,
    weight: list[float] | None = None,
    requires_grad: bool = False,
) -> PreferenceBatch:
    """The batch that holds these rows; its mismatched ratios average to the rows' z0."""
    columns = {
        "margin": [r.margin for r in rows],
        "forget": [r.forget for r in rows],
        "chosen_score": [r.sw for r in rows],
        "rejected_score": [r.sl for r in rows],
        "chosen_from_reference": [r.from_reference for r in rows],
    }
    if weight is not None:
        columns["weight"] = weight

    def scores(values: list[tuple[float, float, float | None, int]]) -> Scores:
        filled = [(p, r, r if q is None else q, n) for p, r, q, n in values]
        return make_scores(filled, columns, dtype, requires_grad)

    return PreferenceBatch(
        chosen=scores([(r.pw, r.rw, r.qw, r.nw) for r in rows]),
        rejected=scores([(r.pl, r.rl, r.ql, r.nl) for r in rows]),
        sampled=scores([(r.ps, r.rs, None, 3) for r in rows]),
        mismatched=Scores(
            torch.tensor([r.z0 for r in rows], dtype=dtype),
            torch.ones(len(rows), dtype=torch.long),
            torch.zeros(len(rows), dtype=dtype),
            columns={} if weight is None else {"weight": torch.tensor(weight, dtype=dtype)},
        ),
        candidate=make_candidates(rows, dtype, weight, requires_grad),
    )


def make_candidates(
    rows: Sequence[Row], dtype: torch.dtype, weight: list[float] | None, requires_grad: bool
) -> Scores:
    """The rows' groups."""
    groups = [row.group for row in rows]
    ends = [list(values) for values in zip(*(one for group in groups for one in group), strict=True)]
    sizes = tuple(len(group) for group in groups)
    weights = [value for value, size in zip(weight or (), sizes, strict=False) for _ in range(size)]
    return Scores(
        torch.tensor(ends[0], dtype=dtype, requires_grad=requires_grad),
        torch.tensor(ends[3]),
        torch.tensor(ends[1], dtype=dtype),
        score=torch.tensor(ends[2], dtype=dtype),
        group_sizes=sizes,
        columns={} if weight is None else {"weight": torch.tensor(weights, dtype=dtype)},
    )


def some_groups(scores: Scores, rows: list[int]) -> Scores:
    """The completions of some groups."""
    places = [place for row in rows for place, group in enumerate(scores.groups.tolist()) if group == row]
    of = torch.tensor(places, dtype=torch.long)
    values = {name: getattr(scores, name)[of] for name in ("logps", "lengths", "ref_logps", "score")}
    sizes = tuple(scores.group_sizes[row] for row in rows)
    return Scores(**values, group_sizes=sizes, columns={name: column[of] for name, column in scores.columns.items()})


def random_rows(n: int, seed: int = 0, z0: float = 0.2) -> list[Row]:
    """Rows within reach of every objective: ratios of a few nats, all log-probabilities negative."""
    draw, of_scores = random.Random(seed), random.Random(f"scores {seed}")
    rows = []
    for _ in range(n):
        rw, rl, rs = (draw.uniform(-50, -8) for _ in range(3))
        rows.append(
            Row(
                pw=rw + draw.uniform(-4, 4),
                pl=rl + draw.uniform(-4, 4),
                rw=rw,
                rl=rl,
                nw=draw.randrange(2, 14),
                nl=draw.randrange(2, 14),
                z0=z0,
                margin=draw.uniform(0, 2),
                forget=float(len(rows) % 3 != 1),
                qw=rw + draw.uniform(-2, 2),
                ql=rl + draw.uniform(-2, 2),
                ps=rs + draw.uniform(-2, 2),
                rs=rs,
                sw=of_scores.uniform(0.4, 1.0),
                sl=of_scores.uniform(0.0, 0.6),
                from_reference=float(of_scores.randrange(2)),
            )
        )
    return rows


# ---- formulas over a group --------------------------------------------------------------------------------------


def log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def shares(values: Sequence[float]) -> list[float]:
    return [math.exp(value - log_sum_exp(values)) for value in values]


def rewards_and_scores(row: Row, beta: float) -> tuple[list[float], list[float]]:
    return [beta * (p - r) for p, r, _, _ in row.group], [score for _, _, score, _ in row.group]


def ranked(row: Row) -> list[tuple[float, float, float, int]]:
    return sorted(row.group, key=lambda completion: -completion[2])


def gold(row: Row) -> tuple[float, float, float, int]:
    return ranked(row)[0]


def tpo(row: Row, beta: float, gamma: float, average: bool) -> float:
    rewards = [beta * p / (n if average else 1) for p, _, _, n in ranked(row)]
    return softplus(rewards[-1] - rewards[1 if len(rewards) > 2 else 0] + gamma)


def tpo_over_tokens(rows: Sequence[Row]) -> list[float]:
    mean_length = mean(gold(r)[3] for r in rows)
    return [tpo(r, 0.3, 0.0, False) - gold(r)[0] / mean_length for r in rows]


def plackett_luce(row: Row, beta: float) -> float:
    z, s = rewards_and_scores(row, beta)
    ranked = [reward for _, reward in sorted(zip(s, z, strict=True), reverse=True)]
    return sum(log_sum_exp(ranked[place:]) - reward for place, reward in enumerate(ranked))


def infonca(row: Row, beta: float, alpha: float) -> float:
    z, s = rewards_and_scores(row, beta)
    labels = shares([score / alpha for score in s])
    return -sum(label * math.log(share) for label, share in zip(labels, shares(z), strict=True))


def nca_scores(row: Row, beta: float, alpha: float) -> float:
    z, s = rewards_and_scores(row, beta)
    labels = shares([score / alpha for score in s])
    return sum(p * softplus(-x) + softplus(x) / len(z) for p, x in zip(labels, z, strict=True))


def lipo_lambda(row: Row, beta: float) -> float:
    z, s = rewards_and_scores(row, beta)
    order = sorted(range(len(z)), key=lambda i: (-z[i], s[i]))
    discount = {i: 1 / math.log(2 + place) for place, i in enumerate(order)}
    return sum(
        (2 ** s[i] - 2 ** s[j]) * abs(discount[i] - discount[j]) * softplus(z[j] - z[i])
        for i in range(len(z))
        for j in range(len(z))
        if s[i] > s[j]
    )


def gvpo(row: Row, beta: float) -> float:
    z, s = rewards_and_scores(row, beta)
    return variance([reward - score for reward, score in zip(z, s, strict=True)]) / 2


def a_star_po(row: Row, beta: float, value_beta: float) -> float:
    z, s = rewards_and_scores(row, beta)
    value = mean(s)
    if value_beta:
        value = value_beta * math.log(mean(math.exp(score / value_beta) for score in s))
    return mean((reward + value - score) ** 2 for reward, score in zip(z, s, strict=True))


# ---- formulas over a row -----------------------------------------------------------------------------------------


def lrml(x: float, tau: float = 0.05) -> float:
    return (1 - sigmoid(x / tau)) * softplus(-x) + sigmoid(x / tau) * math.exp(-x)


def contrast(tokens: Tokens, k: int = 1) -> float:
    """Sum of the token contrasts with the best other token (k = 1, where the draw has one outcome)."""
    assert k == 1
    total = 0.0
    for logp, top, token in zip(tokens.logps, tokens.top, tokens.ids, strict=True):
        best = next(value for i, value in top[: k + 1] if i != token)
        total += softplus(logp - best)
    return total


def drift(tokens: Tokens) -> float:
    return sum(tokens.forward_kl)


def undial(tokens: Tokens, beta: float) -> float:
    total = 0.0
    for logp, ref, kl, entropy in zip(
        tokens.logps, tokens.ref_logps, tokens.forward_kl, tokens.ref_entropy, strict=True
    ):
        # sum_{v != y} r_v (-log p_v), and the token itself at r_y e^-beta; the two divided by what remains of r.
        others = kl + entropy + math.exp(ref) * logp
        total += (others - math.exp(ref - beta) * logp) / (1 - math.exp(ref) + math.exp(ref - beta))
    return total


def aligned(tokens: Tokens) -> float:
    n = len(tokens.ids)
    return math.exp(sum(p - c for p, c in zip(tokens.logps, tokens.collision, strict=True)) / n)


def chi(u: float) -> float:
    return math.exp(u) + u


def bent(a: float, alpha: float) -> float:
    return (1 - math.exp(-alpha * a)) / alpha


def kept_tokens(row: Row, alpha: float) -> float:
    """LD-DPO's margin."""
    common = min(row.nw, row.nl)

    def total(tokens: Tokens) -> float:
        ratios = [p - r for p, r in zip(tokens.logps, tokens.ref_logps, strict=True)]
        return sum(ratios[:common]) + alpha * sum(ratios[common:])

    return total(row.w) - total(row.l)


def scaled_to_one(vector: Sequence[float]) -> list[float]:
    norm = math.sqrt(sum(x * x for x in vector))
    return [x / norm for x in vector]


def kernel(name: str, u: Sequence[float], v: Sequence[float], precision: Sequence[float] | None = None) -> float:
    """With the default parameters, scaled to K(u, u) = 1."""
    square = sum((a - b) ** 2 for a, b in zip(u, v, strict=True))
    if name == "polynomial":
        return (sum(a * b for a, b in zip(u, v, strict=True)) + 1) ** 2 / 4
    if name == "rbf":
        return math.exp(-square / 2)
    if name == "spectral":
        return (math.exp(-square) + 0.5 * math.exp(-square / 10)) / 1.5
    assert precision is not None
    return math.exp(-sum(m * (a - b) ** 2 for m, a, b in zip(precision, u, v, strict=True)) / 2)


def vectors_of(row: Row, given: bool = False) -> list[list[float]]:
    """Prompt and chosen completion, prompt and rejected completion."""
    if given:
        found = [row.w.prompt_embedding, row.w.embedding, row.l.prompt_embedding, row.l.embedding]
    else:
        found = [row.w.prompt_hidden, row.w.hidden, row.l.prompt_hidden, row.l.hidden]
    return [scaled_to_one(vector) for vector in found]


def kernel_margin(row: Row, name: str, given: bool = False, precision: Sequence[float] | None = None) -> float:
    x, w, again, l = vectors_of(row, given)  # noqa: E741
    return math.log(kernel(name, x, w, precision)) - math.log(kernel(name, again, l, precision))


def apart(tokens: Tokens, name: str) -> float:
    return mean(values[DIVERGENCES.index(name)] for values in tokens.divergences)


def distance(row: Row, name: str) -> float:
    return mean(apart(tokens, name) for tokens in (row.w, row.l))


def misdirected(tokens: Tokens, layer: int, scale: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    entries = torch.rand(WIDTH, generator=generator, dtype=torch.float64).tolist()
    length = math.sqrt(sum(x * x for x in entries))
    target = [scale * x / length for x in entries]
    return mean(
        mean((h - c) ** 2 for h, c in zip(states[LAYERS.index(layer)], target, strict=True))
        for states in tokens.states
    )


def displaced(tokens: Tokens, layer: int) -> float:
    column = LAYERS.index(layer)
    return mean(
        mean((h - r) ** 2 for h, r in zip(states[column], before[column], strict=True))
        for states, before in zip(tokens.states, tokens.ref_states, strict=True)
    )


def preference_divergence(x: float, y: float) -> float:
    """KL between the preferences sigmoid(x) and sigmoid(y)."""
    p, q = sigmoid(x), sigmoid(y)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def drawn(row: Row) -> float:
    """SamPO's margin at the first draw, whose noise is taken from the same generator."""
    noise = torch.rand(4096, generator=numbered_generator(0, 0)).tolist()
    common = min(row.nw, row.nl)

    def total(tokens: Tokens) -> float:
        places = sorted(range(len(tokens.ids)), key=lambda t: -noise[t])[:common]
        return sum(tokens.logps[t] - tokens.ref_logps[t] for t in places)

    return total(row.w) - total(row.l)


def within(tokens: Tokens, low: float, high: float) -> float:
    """The sum of clamped log-ratios."""
    return sum(min(max(p - r, low), high) for p, r in zip(tokens.logps, tokens.ref_logps, strict=True))


# ---- formulas over a batch ---------------------------------------------------------------------------------------


def over_tokens(sums: list[float], lengths: list[int]) -> list[float]:
    return [value * len(sums) / sum(lengths) for value in sums]


def sorted_pairs(rows: Sequence[Row]) -> list[float]:
    margins = [r.pw - r.pl for r in rows]
    targets = sorted(r.rw - r.rl for r in rows)
    return [softplus(-0.1 * (m - targets[sorted(margins).index(m)])) for m in margins]


def sorted_roles(rows: Sequence[Row]) -> list[float]:
    ups, downs = [r.uw for r in rows], [r.ul for r in rows]
    up = [softplus(-0.1 * (u - sorted(downs)[sorted(ups).index(u)])) for u in ups]
    return up + [softplus(-0.1 * (sorted(ups)[sorted(downs).index(v)] - v)) for v in downs]


def moving_beta(rows: Sequence[Row]) -> list[float]:
    # In the first batch the running mean is the batch's own, and all pairs are kept: beta stays as it is.
    return [softplus(-0.1 * r.d) for r in rows]


def standardised_lead(rows: Sequence[Row]) -> list[float]:
    leads = [r.per_token for r in rows]
    spread = math.sqrt(variance(leads)) if len(rows) > 1 else 0.0
    z = [(lead - mean(leads)) / max(spread, 1e-6) for lead in leads]
    return [softplus(-(2.5 * (r.aw - r.al) - 1.5 - 2.5 * 0.1 * s)) for r, s in zip(rows, z, strict=True)]


def threshold(rows: Sequence[Row]) -> list[float]:
    rewards = [0.1 * r.uw for r in rows], [0.1 * r.ul for r in rows]
    delta = mean([*rewards[0], *rewards[1]])
    return [softplus(delta - r) for r in rewards[0]] + [softplus(r - delta) for r in rewards[1]]


def scaled(rows: Sequence[Row]) -> list[float]:
    return [0.05 * r.d for r in rows]


def dbaql(rows: Sequence[Row]) -> list[float]:
    y = [x / 0.05 for x in scaled(rows)]
    c = sigmoid(variance(y) if len(y) > 1 else 0.0)
    return [c * softplus(-x / 0.9) + (1 - c) * math.exp(-0.9 * x) for x in scaled(rows)]


def aql(rows: Sequence[Row]) -> list[float]:
    y = [x / 0.05 for x in scaled(rows)]
    q = 0.5 + 0.01 * (sigmoid(mean(y)) - 0.5)
    weights = [sigmoid(-(v - q)) for v in y]
    return [a * softplus(-x) + (1 - a) * max(0, 1 - x) for a, x in zip(weights, scaled(rows), strict=True)]


def aqfl(rows: Sequence[Row]) -> list[float]:
    y = [x / 0.05 for x in scaled(rows)]
    q0 = (math.sqrt(variance(y)) if len(y) > 1 else 0.0) * mean(sigmoid(-v) for v in y)
    q = q0 + 0.05 * (sigmoid(mean(y)) - q0)
    blends = [sigmoid(0.1 * abs(v - q)) for v in y]
    return [g * softplus(-x) + (1 - g) * max(0, 1 - x) for g, x in zip(blends, scaled(rows), strict=True)]


def forget_kto(rows: Sequence[Row], scale: float = 1.0) -> list[float]:
    z = scale * mean(r.uw for r in rows)
    return [1 + 20 * softplus(-(z - 0.1 * r.ul)) for r in rows]


def on_part(rows: Sequence[Row], forget: bool, loss: Callable[[Row], float]) -> list[float]:
    """A mean over some of the rows as values of all of them, whose mean it is."""
    part = [row for row in rows if bool(row.forget) == forget]
    return [len(rows) / len(part) * loss(row) if row in part else 0.0 for row in rows]


def on_part_kto(rows: Sequence[Row]) -> list[float]:
    values = iter(forget_kto([row for row in rows if row.forget]))
    own = {id(row): next(values) for row in rows if row.forget}
    return on_part(rows, True, lambda row: own[id(row)])


def on_part_sft(rows: Sequence[Row]) -> list[float]:
    part = [row for row in rows if not row.forget]
    return [-len(rows) * row.pw / sum(r.nw for r in part) if row in part else 0.0 for row in rows]


def tilted(rows: Sequence[Row], sign: int) -> list[float]:
    losses = [softplus(-0.1 * r.d) for r in rows]
    weights = [math.exp(sign * value / 0.5) for value in losses]
    return [w / mean(weights) * value for w, value in zip(weights, losses, strict=True)]


def mixture(rows: Sequence[Row]) -> list[float]:
    """Squares and hinges by hand; the draw of the first call is part of what is checked, so weights come from it."""
    from prefopt.losses import SurrogateEnsemble

    weights = SurrogateEnsemble().weights()

    def value(z: float) -> float:
        shapes = (
            softplus(-z) / 0.5, max(0, 1 - z), (1 - z) ** 2 / 2, math.exp(-z), max(0, 1 - z) ** 2 / 2,
            (math.sqrt(1 + (1 - z) ** 2) - 1) * math.sqrt(2),
        )  # fmt: skip
        return sum(w * f for w, f in zip(weights, shapes, strict=True))

    return [value(0.1 * r.d) for r in rows]


def inverse_variances(rows: Sequence[Row], shrinkage: float = 0.5) -> list[float]:
    vectors = [vector for row in rows for vector in vectors_of(row)]
    variances = [mean(x * x for x in column) - mean(column) ** 2 for column in zip(*vectors, strict=True)]
    inverse = [1 / ((1 - shrinkage) * v + shrinkage * mean(variances)) for v in variances]
    return [value / mean(inverse) for value in inverse]


def mahalanobis(rows: Sequence[Row]) -> list[float]:
    precision = inverse_variances(rows)
    return [
        softplus(-0.1 * r.d - kernel_margin(r, "mahalanobis", precision=precision)) + 0.1 * distance(r, "wasserstein")
        for r in rows
    ]


def mixed_kernels(rows: Sequence[Row]) -> list[float]:
    """At the start, where all four count a quarter."""
    precision = inverse_variances(rows)

    def total(u: Sequence[float], v: Sequence[float]) -> float:
        return mean(kernel(name, u, v, precision) for name in ("rbf", "polynomial", "spectral", "mahalanobis"))

    values = []
    for r in rows:
        x, w, again, l = vectors_of(r)  # noqa: E741
        k = math.log(total(x, w)) - math.log(total(again, l))
        values.append(softplus(-0.1 * r.d - 2 * k) + 0.1 * distance(r, "js") - 0.3 * 3 * LOG2)
    return values


def pfl(row: Row, y: float) -> float:
    return softplus(-y) / 2 if row.pw > row.pl else 2 * max(0, 1 - y)


def normalised(first: float, second: float) -> float:
    return first / (first + second)


LOG2 = math.log(2)
CASES = [
    Case("plackett_luce(beta=0.1)", lambda r: (plackett_luce(r, 0.1),)),
    Case("infonca(beta=0.3, alpha=0.5)", lambda r: (infonca(r, 0.3, 0.5),)),
    Case("nca_scores(beta=0.3, alpha=0.5)", lambda r: (nca_scores(r, 0.3, 0.5),)),
    Case("lipo_lambda(beta=0.3)", lambda r: (lipo_lambda(r, 0.3),)),
    Case("gvpo(beta=0.3)", lambda r: (gvpo(r, 0.3),)),
    Case("a_star_po(beta=0.3, value_beta=0.5)", lambda r: (a_star_po(r, 0.3, 0.5),)),
    Case("a_star_po(beta=0.3, value_beta=0.0)", lambda r: (a_star_po(r, 0.3, 0.0),)),
    Case("tpo(beta=0.3, alpha=0.5, nll='sum')", lambda r: (tpo(r, 0.3, 0.0, False) - 0.5 * gold(r)[0],)),
    Case(
        "tpo(beta=2.0, gamma=0.4, average=True, nll='mean')",
        lambda r: (tpo(r, 2.0, 0.4, True) - gold(r)[0] / gold(r)[3],),
    ),
    Case("tpo(beta=0.3)", batch_values=tpo_over_tokens),
    # direct
    Case("dpo(beta=0.1)", lambda r: (softplus(-0.1 * r.d),), 0.620957, LOG2),
    Case(
        "dpo(beta=0.1, label_smoothing=0.1)",
        lambda r: (0.9 * softplus(-0.1 * r.d) + 0.1 * softplus(0.1 * r.d),),
        0.635957,
        LOG2,
    ),
    Case("ipo(beta=0.1)", lambda r: ((r.per_token - 5) ** 2,), 22.443906, 25.0),
    Case("ipo(beta=0.1, average=False)", lambda r: ((r.d - 5) ** 2,), 12.25, 25.0),
    Case("hinge(beta=0.1)", lambda r: (max(0.0, 1 - 0.1 * r.d),), 0.85, 1.0),
    Case(
        "robust(beta=0.1, label_smoothing=0.1)",
        lambda r: ((0.9 * softplus(-0.1 * r.d) - 0.1 * softplus(0.1 * r.d)) / 0.8,),
        0.602207,
        LOG2,
    ),
    Case(
        "exo(beta=0.1, label_smoothing=0.1)",
        lambda r: (
            sigmoid(0.1 * r.d) * (-softplus(-0.1 * r.d) - math.log(0.9))
            + sigmoid(-0.1 * r.d) * (-softplus(0.1 * r.d) - math.log(0.1)),
        ),
        0.431388,
        -LOG2 - (math.log(0.9) + math.log(0.1)) / 2,
    ),
    Case("dpo_norm(beta=0.1)", lambda r: (softplus(-0.1 * r.per_token),), 0.680108, LOG2),
    Case(
        "hdpo(beta=0.1, alpha=0.8)",
        lambda r: (softplus(-0.08 * (r.pw - r.pl) + 0.1 * (r.rw - r.rl)),),
        0.639659,
    ),
    Case(
        "hdpo(beta=0.1, alpha=1.2)",
        lambda r: (softplus(-0.12 * (r.pw - r.pl) + 0.1 * (r.rw - r.rl)),),
        0.602653,
    ),
    Case("margin_dpo(beta=0.1)", lambda r: (softplus(r.margin - 0.1 * r.d),), 0.620957),
    # scored
    Case("rebel(eta=2.0)", lambda r: ((r.d - 2 * (r.sw - r.sl)) ** 2,), 0.25),
    Case(
        "reward_aware(beta=0.1, scale=2.0)",
        lambda r: (preference_divergence(2 * (r.sw - r.sl), 0.1 * r.d),),
        0.273504,
    ),
    Case(
        "reward_aware(beta=0.1, scale=2.0, distance='fwd')",
        lambda r: (preference_divergence(0.1 * r.d, 2 * (r.sw - r.sl)),),
        0.361726,
    ),
    Case(
        "reward_aware(beta=0.1, scale=2.0, distance='sq')", lambda r: ((0.1 * r.d - 2 * (r.sw - r.sl)) ** 2,), 3.4225
    ),
    Case(
        "reward_aware(beta=0.1, scale=2.0, distance='scale')",
        lambda r: (2 * abs(r.sw - r.sl) * softplus(-0.1 * r.d),),
        1.241914,
    ),
    Case("mappo(beta=0.1)", lambda r: (softplus(-0.1 * (r.uw - (r.sw - r.sl) * r.ul)),), 0.620957, LOG2),
    Case(
        "sppo_soft(beta=0.1)",
        lambda r: ((r.uw - 10 * (r.sw - 0.5)) ** 2 + (r.ul - 10 * (r.sl - 0.5)) ** 2,),
        36.25,
    ),
    Case(
        "sppo_soft(beta=0.1, reduction='mean')",
        lambda r: (((r.uw - 10 * (r.sw - 0.5)) ** 2 + (r.ul - 10 * (r.sl - 0.5)) ** 2) / 2,),
        18.125,
    ),
    # penalised
    Case("dpo_shift(beta=0.1, shift=0.75)", lambda r: (softplus(-0.1 * (r.uw - 0.75 * r.ul)),), 0.626759, LOG2),
    Case("sampo(beta=0.1)", lambda r: (softplus(-0.1 * drawn(r)),)),
    Case(
        "dpop(beta=0.1, lam=5.0)",
        lambda r: (softplus(-0.1 * (r.d - 5 * max(0, r.rw - r.pw))),),
        0.620957,
        LOG2,
    ),
    Case("rdpo(beta=0.1, alpha=0.01)", lambda r: (softplus(-0.1 * r.d - 0.01 * (r.nw - r.nl)),), 0.634946),
    Case("ld_dpo(beta=0.1, alpha=0.5)", lambda r: (softplus(-0.1 * kept_tokens(r, 0.5)),)),
    Case("chi_po(beta=0.1)", lambda r: (softplus(-0.1 * (chi(r.uw) - chi(r.ul))),), 0.528778, LOG2),
    Case(
        "chi_po(beta=0.1, clip=0.2)",
        lambda r: (softplus(-max(-0.2, min(0.2, 0.1 * (chi(r.uw) - chi(r.ul))))),),
        softplus(-0.2),
        LOG2,
    ),
    Case("f_dpo(beta=0.1)", lambda r: (softplus(-0.1 * r.d),), 0.620957, LOG2),
    Case(
        "f_dpo(beta=0.1, divergence='forward_kl')",
        lambda r: (softplus(-0.1 * (math.exp(-r.ul) - math.exp(-r.uw))),),
        0.631154,
        LOG2,
    ),
    Case(
        "f_dpo(beta=0.1, divergence='js')",
        lambda r: (softplus(-0.1 * (softplus(-r.ul) - softplus(-r.uw))),),
        0.660652,
        LOG2,
    ),
    Case(
        "f_dpo(beta=0.1, divergence='alpha', alpha=0.5)",
        lambda r: (softplus(-0.1 * (math.exp(-r.uw / 2) - math.exp(-r.ul / 2)) / -0.5),),
        0.627691,
        LOG2,
    ),
    # pointwise
    Case(
        "nca(beta=0.1)",
        lambda r: (softplus(-0.1 * r.uw) + 0.5 * softplus(0.1 * r.uw) + 0.5 * softplus(0.1 * r.ul),),
        1.350825,
        2 * LOG2,
    ),
    Case("bco_pair(beta=0.1)", lambda r: (softplus(-0.1 * r.uw) + softplus(0.1 * r.ul),), 1.312856, 2 * LOG2),
    Case("bco(beta=0.1)", batch_values=threshold, at_equality=LOG2, held=True),
    Case("sppo(beta=0.1)", lambda r: ((r.uw - 5) ** 2 + (r.ul + 5) ** 2,), 36.25, 50.0),
    Case("sppo(beta=0.1, reduction='mean')", lambda r: (((r.uw - 5) ** 2 + (r.ul + 5) ** 2) / 2,), 18.125, 25.0),
    Case("apo_zero(beta=0.1)", lambda r: (1 - sigmoid(0.1 * r.uw) + sigmoid(0.1 * r.ul),), 0.962523, 1.0),
    Case("apo_down(beta=0.1)", lambda r: (sigmoid(0.1 * r.uw) + 1 - sigmoid(0.1 * r.d),), 0.987549, 1.0),
    Case(
        "cal_dpo(beta=0.1, weight=1.0)",
        lambda r: (softplus(-r.d) + (r.uw - 5) ** 2 + (r.ul + 5) ** 2,),
        36.451413,
    ),
    Case(
        "cal_dpo(beta=0.1)",
        lambda r: (softplus(-r.d) + 0.5 * ((r.uw - 5) ** 2 + (r.ul + 5) ** 2),),
        18.326413,
        LOG2 + 25,
    ),
    # batchwise
    Case("aot(beta=0.1)", batch_values=sorted_pairs, at_reference_vector=0.620957, at_equality=LOG2),
    Case("aot_unpaired(beta=0.1)", batch_values=sorted_roles, at_reference_vector=2 * 0.620957, at_equality=LOG2),
    Case("beta_dpo(beta=0.1, keep=1.0)", batch_values=moving_beta, at_reference_vector=0.620957, at_equality=LOG2),
    Case("alpha_dpo", batch_values=standardised_lead, held=True),
    Case(
        "rainbow_po(beta=10.0, mixing=0.25, home=0.3)",
        lambda r: (softplus(-10 * (r.aw - r.al - 0.25 * (r.rw / r.nw - r.rl / r.nl) - 0.75 * 0.3)),),
    ),
    Case(
        "rainbow_po(beta=0.1, mixing=0.5, home=0.0, average=False)",
        lambda r: (softplus(-0.1 * (r.pw - r.pl - 0.5 * (r.rw - r.rl))),),
    ),
    # shapes
    Case("gpo(beta=0.1)", lambda r: (softplus(-0.1 * r.d),), 0.620957, LOG2),
    Case("gpo(beta=0.1, shape='hinge')", lambda r: (max(0.0, 1 - 0.1 * r.d),), 0.85, 1.0),
    Case("gpo(beta=0.1, shape='squared')", lambda r: ((1 - 0.1 * r.d) ** 2,), 0.7225, 1.0),
    Case("gpo(beta=0.1, shape='exponential')", lambda r: (math.exp(-0.1 * r.d),), 0.860708, 1.0),
    Case("gpo(beta=0.1, shape='truncated_quadratic')", lambda r: (max(0.0, 1 - 0.1 * r.d) ** 2,), 0.7225, 1.0),
    Case("gpo(beta=0.1, shape='savage')", lambda r: (sigmoid(-0.1 * r.d) ** 2,), 0.213971, 0.25),
    Case("gpo(beta=0.1, shape='tangent')", lambda r: ((2 * math.atan(0.1 * r.d) - 1) ** 2,), at_equality=1.0),
    Case(
        "gpo(beta=0.1, shape='poly1')",
        lambda r: (softplus(-0.1 * r.d) + sigmoid(-0.1 * r.d),),
        at_equality=LOG2 + 0.5,
    ),
    Case(
        "gpo(beta=0.1, shape='focal')",
        lambda r: ((1 - sigmoid(0.1 * r.d)) ** 2 * softplus(-0.1 * r.d),),
        at_equality=LOG2 / 4,
    ),
    Case(
        "gpo(beta=0.1, shape='pseudo_huber', normalize=True)",
        lambda r: (math.sqrt(2) * (math.sqrt(1 + (1 - 0.1 * r.d) ** 2) - 1),),
        at_equality=2 - math.sqrt(2),
    ),
    Case(
        "gpo(beta=0.1, shape='squentropy')",
        lambda r: (softplus(-0.1 * r.d) + (0.05 * r.d) ** 2,),
        at_equality=LOG2,
    ),
    Case("surrogate_ensemble(beta=0.1)", batch_values=mixture),
    # discovered
    Case("discopop(beta=0.1)", lambda r: (lrml(0.1 * r.d),), 0.849338, (LOG2 + 1) / 2),
    Case("discopop(beta=0.05)", lambda r: (lrml(0.05 * r.d),), lrml(0.075), (LOG2 + 1) / 2),
    Case("dbaql", batch_values=dbaql, at_equality=(LOG2 + 1) / 2),
    Case("aql", batch_values=aql),
    Case("aqfl", batch_values=aqfl),
    Case(
        "padll(beta=0.1)",
        lambda r: (0.9 * (0.5 if r.d < 0 else 1.0) * softplus(-0.1 * r.d),),
        0.558861,
        0.9 * LOG2,
    ),
    Case(
        "cell(beta=0.1)",
        lambda r: (0.5 * math.exp(-0.1 * r.d) + 0.5 * softplus(-0.1 * r.d),),
        0.740833,
        0.5 + LOG2 / 2,
    ),
    Case("pfl(beta=0.1)", lambda r: (pfl(r, 2 * r.d),), 0.024294),
    Case("pfl(beta=0.1, form='search')", lambda r: (pfl(r, r.d),)),
    Case("pfl(beta=0.1, form='repository')", lambda r: (pfl(r, 0.1 * r.d),), 0.310479),
    # tokenwise
    Case("tdpo(beta=0.1)", lambda r: (softplus(-0.1 * (r.d - 0.5 * (drift(r.l) - drift(r.w)))),), held=True),
    Case("tdpo(beta=0.1, variant=1)", lambda r: (softplus(-0.1 * (r.d - (drift(r.l) - drift(r.w)))),)),
    # kernel
    Case(
        "kernel_dpo(divergence='hellinger')",
        lambda r: (softplus(-0.1 * r.d - kernel_margin(r, "rbf")) + 0.1 * distance(r, "hellinger"),),
    ),
    Case(
        "kernel_dpo(kernel='polynomial', divergence='renyi', gamma=0.5, link='linear')",
        lambda r: (-0.1 * (r.pw - r.pl) - 0.5 * kernel_margin(r, "polynomial") + 0.1 * distance(r, "renyi(0.9)"),),
    ),
    Case(
        "kernel_dpo(kernel='spectral', divergence=f(generator='triangular'), embeddings='given')",
        lambda r: (
            softplus(-0.1 * r.d - kernel_margin(r, "spectral", given=True)) + 0.1 * distance(r, "f(triangular)"),
        ),
    ),
    Case(
        "kernel_dpo(kernel='spectral', divergence='bhattacharyya', gradient=False)",
        lambda r: (softplus(-0.1 * r.d - kernel_margin(r, "spectral")) + 0.1 * distance(r, "bhattacharyya"),),
        held=True,
    ),
    Case(
        "kernel_dpo(divergence=renyi(order=2.0), gamma=0.0, link='linear')",
        lambda r: (-0.1 * (r.pw - r.pl) + 0.1 * distance(r, "renyi(2.0)"),),
    ),
    Case(
        "kernel_dpo(divergence='js', gamma=0.5, alpha=0.5, inside=True)",
        lambda r: (
            softplus(-0.1 * r.d - 0.5 * kernel_margin(r, "rbf") + 0.5 * (apart(r.w, "js") - apart(r.l, "js"))),
        ),
    ),
    Case("kernel_dpo(gamma=0.0, alpha=0.0)", lambda r: (softplus(-0.1 * r.d),), 0.620957, LOG2),
    Case("kernel_dpo(kernel='mahalanobis', divergence='wasserstein')", batch_values=mahalanobis, held=True),
    Case("hmk(divergence='js', gamma=2.0, entropy=0.3)", batch_values=mixed_kernels, held=True),
    # logic, its rows counted one by one
    Case("logic", lambda r: (softplus(-odds_of_rows("11,10", "01", r.aw, r.al)),), 0.886075),
    Case(
        "logic(T='10,00', B='11,01', beta=0.7, gamma=0.3)",
        lambda r: (softplus(0.3 - 0.7 * odds_of_rows("10,00", "11,01", r.aw, r.al)),),
    ),
    Case(
        "logic(T='11,10', B='11,01', over='M(w)&Ref(l), M(l)&Ref(w)', beta=0.1, average=False)",
        lambda r: (softplus(-0.1 * r.d),),
        0.620957,
        LOG2,
    ),
    Case(
        "logic(T='11', B='10,01', over='M(w), Prev(l)', link='hinge')",
        lambda r: (max(0.0, 1 - odds_of_rows("11", "10,01", r.aw, (r.rl if r.ql is None else r.ql) / r.nl)),),
    ),
    Case("logic(T='10', B='01', link='squared')", lambda r: ((odds_of_rows("10", "01", r.aw, r.al) - 0.5) ** 2,)),
    # reference-free
    Case("simpo(beta=2.5, gamma=1.25)", lambda r: (softplus(1.25 - 2.5 * (r.aw - r.al)),), 2.578890),
    Case("cpo(beta=0.1)", lambda r: (softplus(-0.1 * (r.pw - r.pl)),), 0.598139),
    Case(
        "cpo(beta=0.1, label_smoothing=0.2)",
        lambda r: (0.8 * softplus(-0.1 * (r.pw - r.pl)) + 0.2 * softplus(0.1 * (r.pw - r.pl)),),
    ),
    Case("slic(delta=50.0)", lambda r: (max(0.0, 50 - (r.pw - r.pl)),), 48.0),
    Case("simper", lambda r: (math.exp(r.al) - math.exp(r.aw),), 0.087795),
    Case("rrhf", lambda r: (max(0.0, r.al - r.aw),), 0.5),
    Case(
        "alpha_po(beta=2.5, gamma=0.25, alpha=0.25)",
        lambda r: (softplus(0.25 - 2.5 * (bent(r.aw, 0.25) - bent(r.al, 0.25))),),
    ),
    Case("orpo(beta=1.0)", lambda r: (softplus(-(odds(r.aw) - odds(r.al))),), 1.042058),
    Case("asft(beta=1.0)", lambda r: (softplus(-odds(r.aw)) + softplus(odds(r.al)),), 2.252482),
    # likelihood
    Case("sft", lambda r: (-r.aw,), 2.0),
    Case("sft(nll='sum')", lambda r: (-r.pw,), 10.0),
    Case("sft(nll='token')", batch_values=lambda rows: over_tokens([-r.pw for r in rows], [r.nw for r in rows])),
    # binary
    Case(
        "kto(beta=0.1)",
        lambda r: (sigmoid(0.1 * (r.z0 - r.uw)), sigmoid(0.1 * (r.ul - r.z0))),
        0.962518,
    ),
    Case(
        "kto(beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)",
        lambda r: (1.5 * sigmoid(0.2 * (r.z0 - r.uw)), 0.5 * sigmoid(0.2 * (r.ul - r.z0))),
        1.5 * sigmoid(0.2 * (0.3 - 1)) + 0.5 * sigmoid(0.2 * (-0.5 - 0.3)),
    ),
    Case("cringe", lambda r: (-r.aw, contrast(r.l) / r.nl)),
    Case(
        "cringe(weight=0.5, reduction='token')",
        batch_values=lambda rows: over_tokens(
            [-r.pw for r in rows] + [0.5 * contrast(r.l) for r in rows], [r.nw for r in rows] + [r.nl for r in rows]
        ),
    ),
    Case(
        "pairwise_cringe(margin=5.0, temperature=20.0, k=1, gate_gradient=True)",
        lambda r: (sigmoid((5 - (r.pw - r.pl)) / 20) * (contrast(r.l) / r.nl - r.aw),),
    ),
    Case(
        "pairwise_cringe(margin=5.0, temperature=20.0, k=1)",
        lambda r: (sigmoid((5 - (r.pw - r.pl)) / 20) * (contrast(r.l) / r.nl - r.aw),),
        held=True,
    ),
    # unlearning
    Case("npo(beta=0.1)", lambda r: (20 * softplus(0.1 * r.ul),), 13.369193, 20 * LOG2),
    Case("simnpo(beta=4.5)", lambda r: (softplus(4.5 * r.al) / 2.25,), 0.000520),
    Case("simnpo(beta=0.5, delta=1.0)", lambda r: (4 * softplus(0.5 * (r.al + 1)),)),
    Case("ga", batch_values=lambda rows: over_tokens([r.pl for r in rows], [r.nl for r in rows])),
    Case("ga(nll='mean')", lambda r: (r.al,), -1.5),
    Case("kl_retain(reduction='mean')", lambda r: (sum(r.w.forward_kl) / r.nw,)),
    Case(
        "kl_retain(direction='reverse')",
        batch_values=lambda rows: over_tokens([sum(r.w.reverse_kl) for r in rows], [r.nw for r in rows]),
    ),
    Case(
        "wga(beta=0.7)",
        batch_values=lambda rows: over_tokens(
            [sum(math.exp(0.7 * p) * p for p in r.l.logps) for r in rows], [r.nl for r in rows]
        ),
        held=True,
    ),
    Case(
        "sat_imp(beta1=2.0, beta2=1.0)",
        batch_values=lambda rows: over_tokens(
            [sum(math.exp(2 * p) * (1 - math.exp(p)) * p for p in r.l.logps) for r in rows], [r.nl for r in rows]
        ),
        held=True,
    ),
    Case(
        "undial(beta=3.0)",
        batch_values=lambda rows: over_tokens([undial(r.l, 3.0) for r in rows], [r.nl for r in rows]),
    ),
    Case(
        "ce_u",
        batch_values=lambda rows: over_tokens([-sum(r.l.others[1:]) for r in rows], [r.nl - 1 for r in rows]),
    ),
    Case(
        "ce_u(skip=0)",
        batch_values=lambda rows: over_tokens([-sum(r.l.others) for r in rows], [r.nl for r in rows]),
    ),
    Case(
        "flatten",
        batch_values=lambda rows: over_tokens([sum(x * x for x in r.l.peak) for r in rows], [r.nl for r in rows]),
    ),
    Case("rmu(layer=1, scale=3.0, seed=2)", lambda r: (misdirected(r.l, 1, 3.0, 2),)),
    Case("rmu_retain(layer=0)", lambda r: (displaced(r.w, 0),)),
    Case("kto_forget(beta=0.1)", batch_values=forget_kto, held=True),
    Case("kto_forget(beta=0.1, baseline='paper')", batch_values=lambda rows: forget_kto(rows, 0.1), held=True),
    # online
    Case(
        "inpo(eta=0.5, tau=0.16666666666666666)",
        lambda r: (
            (
                (r.pw - r.pl)
                - (r.rw - r.rl) / 3
                - ((r.rw if r.qw is None else r.qw) - (r.rl if r.ql is None else r.ql)) * 2 / 3
                - 1
            )
            ** 2,
        ),
        0.25,
    ),
    Case("xpo_bonus", lambda r: (r.pw if r.from_reference else r.pl,), -12.0),
    Case("kl_online", lambda r: (r.ps - r.rs,), held=True),
    Case("kl_online(baseline='none')", lambda r: (r.ps - r.rs,), held=True),
    Case("kl_prior(reduction='mean')", lambda r: (sum(r.w.forward_kl) / r.nw,)),
    Case("kl_prior", batch_values=lambda rows: [len(rows) * sum(r.w.forward_kl) / r.nw for r in rows]),
    # conflict: the value is the sum's, what changes is how gradients are added up
    Case("conflict_free(dpo(beta=0.1) + 0.5*sft(nll='mean'))", lambda r: (softplus(-0.1 * r.d) - 0.5 * r.aw,)),
    Case(
        "conflict_free(cpo(beta=0.1) + simpo(beta=2.5, gamma=1.25), method='pcgrad')",
        lambda r: (softplus(-0.1 * (r.pw - r.pl)) + softplus(1.25 - 2.5 * (r.aw - r.al)),),
    ),
    Case("pair_normalized(dpo(beta=0.1))", lambda r: (softplus(-0.1 * r.d),), 0.620957),
    Case(
        "pair_normalized(simpo(beta=2.5, gamma=1.25) + 0.5*sft(nll='mean'))",
        lambda r: (softplus(1.25 - 2.5 * (r.aw - r.al)) - 0.5 * r.aw,),
    ),
    # wrappers
    Case("wpo(dpo(beta=0.1))", lambda r: (aligned(r.w) * aligned(r.l) * softplus(-0.1 * r.d),), held=True),
    Case(
        "wpo(dpo(beta=0.1), aligned=False, clamp=True)",
        lambda r: (math.exp(r.aw + r.al) * softplus(-0.1 * r.d),),
        held=True,
    ),
    Case("humanline(dpo(beta=0.1))", lambda r: (softplus(-0.1 * (within(r.w, -1, 1.5) - within(r.l, -1, 1.5))),)),
    Case(
        "humanline(ipo(beta=0.1, average=False), low=-0.1, high=0.2)",
        lambda r: ((within(r.w, -0.1, 0.2) - within(r.l, -0.1, 0.2) - 5) ** 2,),
    ),
    Case(
        "humanline(ld_dpo(beta=0.1, alpha=1.0), low=-0.1, high=0.2)",
        lambda r: (softplus(-0.1 * (within(r.w, -0.1, 0.2) - within(r.l, -0.1, 0.2))),),
    ),
    Case("length_normalized(dpo(beta=2.0))", lambda r: (softplus(-2 * r.per_token),), at_equality=LOG2),
    Case(
        "noise_robust(dpo(beta=0.1))",
        lambda r: (normalised(softplus(-0.1 * r.d), softplus(0.1 * r.d)),),
        at_equality=0.5,
    ),
    Case(
        "noise_robust(hinge(beta=0.1), method='unbiased', rate=0.2)",
        lambda r: ((0.8 * max(0, 1 - 0.1 * r.d) - 0.2 * max(0, 1 + 0.1 * r.d)) / 0.6,),
        at_equality=1.0,
    ),
    Case(
        "noise_robust(dpo(beta=0.1), method='smoothed', rate=0.1)",
        lambda r: (0.9 * softplus(-0.1 * r.d) + 0.1 * softplus(0.1 * r.d),),
        0.635957,
        LOG2,
    ),
    Case("dual(sft(nll='mean'), limit=0.5, weight=4.0, step=2.0)", lambda r: (4 * (-r.aw - 0.5),), 6.0),
    Case("dual(sft(nll='mean'), weight=4.0, step=2.0, warmup=1)", lambda r: (-4 * r.aw,), 8.0),
    Case(
        "on_forget(dpo(beta=0.1))",
        batch_values=lambda rows: on_part(rows, True, lambda r: softplus(-0.1 * r.d)),
        at_reference_vector=0.620957,
    ),
    Case("on_forget(kto_forget(beta=0.1))", batch_values=on_part_kto, held=True),
    Case(
        "on_retain(npo(beta=0.1))", batch_values=lambda rows: on_part(rows, False, lambda r: 20 * softplus(0.1 * r.ul))
    ),
    Case("on_retain(sft(nll='token'))", batch_values=on_part_sft),
    Case(
        "reweighted(dpo(beta=0.1), temperature=0.5)",
        batch_values=lambda rows: tilted(rows, -1),
        at_reference_vector=0.620957,
        at_equality=LOG2,
        held=True,
    ),
    Case(
        "reweighted(dpo(beta=0.1), trust='large', temperature=0.5)",
        batch_values=lambda rows: tilted(rows, 1),
        at_reference_vector=0.620957,
        at_equality=LOG2,
        held=True,
    ),
]
