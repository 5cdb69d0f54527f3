"""Structures: formulas to rows, counts against enumeration, the paper's losses, and the order by entailment."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from prefopt.logic import NAMED, FormulaError, Structure, from_formula, named
from prefopt.logic.lattice import LatticeError, below, draw, every_structure
from prefopt.logic.structure import name_of
from prefopt.losses import PreferenceBatch, Scores, parse
from prefopt.losses.logic import MODEL, WITH_REFERENCE, Logic, log_count, rows_of

ALL = every_structure()
LEARNABLE = [structure for structure in ALL if not structure.trivial]


def likely_batch(n: int = 40, seed: int = 0) -> PreferenceBatch:
    """Completions likely enough that complements matter, float64; with samples and a previous iterate."""
    draw = torch.Generator().manual_seed(seed)

    def scores() -> Scores:
        lengths = torch.randint(1, 5, (n,), generator=draw)
        first, second, third = (-lengths * (0.05 + torch.rand(n, generator=draw, dtype=torch.float64)) for _ in "123")
        return Scores(first, lengths, second, prev_logps=third)

    return PreferenceBatch(chosen=scores(), rejected=scores(), sampled=scores())


def enumerated(rows: str, probabilities: list[float]) -> float:
    """The weighted model count as its definition has it."""
    return math.fsum(
        math.prod(p if digit == "1" else 1 - p for p, digit in zip(probabilities, row, strict=True))
        for row in rows.split(",")
        if row
    )


def test_there_are_256_structures_of_two_propositions():
    assert len({(structure.T, structure.B) for structure in ALL}) == 256
    assert len(LEARNABLE) == 15 * 15


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_counts_equal_enumeration(count):
    draw = random.Random(count)
    every = ["".join(row) for row in itertools.product("01", repeat=count)]
    if count <= 2:
        sets = [",".join(r for r, kept in zip(every, keep, strict=True) if kept)
                for keep in itertools.product([0, 1], repeat=len(every))]  # fmt: skip
    else:
        sets = [",".join(draw.sample(every, draw.randint(1, len(every)))) for _ in range(60)]
    for rows in sets:
        probabilities = [draw.uniform(0.01, 0.99) for _ in range(count)]
        weights = [torch.tensor([math.log(p)], dtype=torch.float64) for p in probabilities]
        found = math.exp(log_count(rows_of("rows", rows, count), weights))
        assert found == pytest.approx(enumerated(rows, probabilities), abs=1e-12), rows


@pytest.mark.parametrize("structure", ALL, ids=lambda s: f"{s.T}|{s.B}")
def test_closed_forms_equal_enumeration(structure):
    """The odds as printed, evaluated: they are our own text."""
    draw = random.Random(f"{structure.T}|{structure.B}")
    for _ in range(5):
        p, q = draw.uniform(0.01, 0.99), draw.uniform(0.01, 0.99)
        text = structure.odds.replace("P(w)", "p").replace("P(l)", "q").replace(")p", ")*p").replace(")q", ")*q")
        text = text.replace(")(", ")*(").replace("p(", "p*(").replace("q(", "q*(").replace("pq", "p*q")
        true, false = enumerated(structure.T, [p, q]), enumerated(structure.B, [p, q])
        if false == 0:
            assert text.endswith("/0")
        else:
            assert eval(text, {"p": p, "q": q}) == pytest.approx(true / false, rel=1e-12), structure.odds


@pytest.mark.parametrize("structure", ALL, ids=lambda s: f"{s.T}|{s.B}")
def test_a_structure_written_as_formulas_is_the_same_structure(structure):
    assert Structure.of(structure.core, structure.given, structure.also, structure.over) == structure


@pytest.mark.parametrize("over", ["M(w), M(l), Ref(w)", "M(w), M(l), M(s), Prev(l)"])
def test_more_propositions_go_back_and_forth_too(over):
    draw = random.Random(over)
    count = over.count(",") + 1
    every = ["".join(row) for row in itertools.product("01", repeat=count)]
    for _ in range(25):
        sides = [",".join(draw.sample(every, draw.randint(1, len(every)))) for _ in "TB"]
        structure = Structure(*sides, over)
        assert Structure.of(structure.core, structure.given, structure.also, over) == structure


def test_the_table_of_the_paper():
    rows = {name: (named(name).T, named(name).B) for name in NAMED}
    assert rows == {
        "CE": ("11,10", "01,00"),
        "CEUnl": ("10", "11,01,00"),
        "CPO": ("11,10", "11,01"),
        "ORPO": ("10", "01"),
        "unCPO": ("11,10,00", "01"),
        "cCPO": ("11,10", "01"),
        "fUNL": ("10,00", "11,01"),
        "qfUNL": ("10,00", "01"),
        "cfUNL": ("10", "11,01"),
    }


P_AND_Q = {
    "CE": lambda p, q: -math.log(p),
    "CEUnl": lambda p, q: -math.log(p) - math.log(1 - q),
    "CPO": lambda p, q: math.log(1 + q / p),
    "ORPO": lambda p, q: math.log(1 + q * (1 - p) / (p * (1 - q))),
    "unCPO": lambda p, q: -math.log(1 - q * (1 - p)),
    "cCPO": lambda p, q: math.log(1 + q * (1 - p) / p),
    "fUNL": lambda p, q: -math.log(1 - q),
    "qfUNL": lambda p, q: math.log(1 + q * (1 - p) / (1 - q)),
    "cfUNL": lambda p, q: math.log(1 + q / (p * (1 - q))),
}


@pytest.mark.parametrize("name", NAMED)
def test_losses_of_the_paper_in_plain_numbers(name):
    batch = likely_batch()
    values = named(name).loss().per_example(batch)
    p, q = (torch.exp(scores.mean_logps).tolist() for scores in (batch.chosen, batch.rejected))
    assert values.tolist() == pytest.approx([P_AND_Q[name](*pair) for pair in zip(p, q, strict=True)], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "structure", "options"),
    [
        ("dpo(beta=0.3)", named("CPO", reference=True), {"beta": 0.3, "average": False}),
        ("dpo_norm(beta=0.3)", named("CPO", reference=True), {"beta": 0.3}),
        ("ipo(beta=0.3)", named("CPO", reference=True), {"beta": 0.3, "link": "squared"}),
        ("hinge(beta=0.3)", named("CPO", reference=True), {"beta": 0.3, "average": False, "link": "hinge"}),
        ("cpo(beta=0.3)", named("CPO"), {"beta": 0.3, "average": False}),
        ("simpo(beta=2, gamma=0.7)", named("CPO"), {"beta": 2.0, "gamma": 0.7}),
        ("orpo(beta=0.3)", named("ORPO"), {"beta": 0.3}),
        ("asft", named("CEUnl"), {}),
        ("sft(nll='mean')", named("CE"), {}),
        ("sft(nll='sum')", named("CE"), {"average": False}),
    ],
)
def test_named_losses_equal_their_compiled_forms(name, structure, options):
    batch = likely_batch()
    expected = parse(name).per_example(batch)
    assert torch.allclose(structure.loss(**options).per_example(batch), expected, rtol=1e-9, atol=1e-12)


def test_npo_is_the_structure_of_cpo_with_the_reference_as_winner():
    loss = (2 / 0.1) * from_formula(
        "M(l) -> Ref(l)", "M(l) or Ref(l)", "M(l) and Ref(l)", over="Ref(l), M(l)", beta=0.1, average=False
    )
    batch = likely_batch()
    assert torch.allclose(loss.per_example(batch), parse("npo(beta=0.1)").per_example(batch), rtol=1e-12)


def test_reference_and_policy_as_four_propositions_or_as_two():
    over = WITH_REFERENCE
    two = from_formula("M(l) -> M(w)", "M(w) or M(l)", over=over)
    four = from_formula(
        "M(l) and Ref(w) -> M(w) and Ref(l)", "M(w) and Ref(l) or M(l) and Ref(w)", over="M(w), M(l), Ref(w), Ref(l)"
    )
    batch = likely_batch()
    assert torch.allclose(two.per_example(batch), four.per_example(batch), rtol=1e-12)


def test_sampled_completions_and_the_previous_iterate_take_part():
    loss = from_formula("M(w) and not M(s)", given="M(w) or M(s) or Prev(l)")
    assert loss.over == "M(w), M(s), Prev(l)"
    assert loss.roles == ("chosen", "rejected", "sampled")
    batch = likely_batch()
    p, s, v = (
        torch.exp(x).tolist()
        for x in (
            batch.chosen.mean_logps,
            batch.sampled.mean_logps,
            batch.rejected.prev_logps / batch.rejected.lengths,
        )
    )
    for value, a, b, c in zip(loss.per_example(batch).tolist(), p, s, v, strict=True):
        true = a * (1 - b)
        assert value == pytest.approx(-math.log(true / (1 - (1 - a) * (1 - b) * (1 - c))), rel=1e-12)


# ---- the order -----------------------------------------------------------------------------------------------------


def test_a_more_demanding_structure_never_has_the_lower_loss():
    batch = likely_batch(30)
    values = {structure: structure.loss().per_example(batch) for structure in LEARNABLE}
    ordered = 0
    for one, other in itertools.permutations(LEARNABLE, 2):
        if one.at_least_as_demanding_as(other):
            assert bool((values[one] >= values[other] - 1e-12).all()), (one, other)
            ordered += 1
    assert ordered > 2000


def test_the_order_of_the_paper():
    above = {
        "CEUnl": {"CE", "CPO", "ORPO", "cCPO", "unCPO", "fUNL"},
        "CE": {"cCPO", "unCPO"},
        "CPO": {"cCPO", "unCPO"},
        "ORPO": {"cCPO", "unCPO"},
        "cCPO": {"unCPO"},
        "fUNL": {"unCPO"},
    }
    certain = [name for name in NAMED if name not in ("qfUNL", "cfUNL")]
    for name in certain:
        found = {other for other in certain if other != name and named(name).at_least_as_demanding_as(named(other))}
        assert found == above.get(name, set()), name


def test_structures_that_are_not_ordered_cross():
    batch = likely_batch(200)
    for one, other in (("CE", "CPO"), ("CPO", "ORPO"), ("CE", "ORPO")):
        gap = named(one).loss().per_example(batch) - named(other).loss().per_example(batch)
        assert bool((gap > 0).any()), (one, other)
        assert bool((gap < 0).any()), (one, other)


def test_steps_of_the_order_change_one_row_of_one_side():
    covers = below(ALL)
    assert sum(map(len, covers.values())) == 8 * 2**7
    for structure, lower in covers.items():
        for other in lower:
            changed = [bin(a ^ b).count("1") for a, b in zip(structure.rows, other.rows, strict=True)]
            assert sum(changed) == 1


@pytest.mark.parametrize(("everything", "ending"), [(False, ".png"), (True, ".svg")])
def test_the_order_is_drawn(tmp_path, ending, everything):
    path = tmp_path / f"order{ending}"
    what = "256 structures, 1024 steps" if everything else "9 structures, 12 steps"
    assert draw(path, everything) == f"{path}: {what}"
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_a_picture_of_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(LatticeError, match=r"order\.txt: write to a file that ends in \.png"):
        draw(tmp_path / "order.txt")


# ---- names and errors ----------------------------------------------------------------------------------------------


def test_names_are_found_again():
    for name in NAMED:
        assert name_of(named(name)) == name
        assert name_of(named(name, reference=True)) == f"{name} over policy and reference"
    assert name_of(Structure("10", "00")) == ""


def test_atoms_come_in_the_order_of_the_tables_whatever_the_formula_says_first():
    assert from_formula("Ref(l) and M(s) -> M(l) and M(w)").over == "M(w), M(l), M(s), Ref(l)"
    assert Structure.of("not M(l)", over=MODEL).T == "10,00"


def test_formulas_that_teach_nothing_are_refused():
    with pytest.raises(ValueError, match="no row is on the false side of 'M\\(w\\) or not M\\(w\\)'"):
        from_formula("M(w) or not M(w)")
    with pytest.raises(ValueError, match="no row is on the true side of 'M\\(l\\)' given 'not M\\(l\\)'"):
        from_formula("M(l)", given="not M(l)")
    with pytest.raises(FormulaError, match="the core formula is empty"):
        from_formula(" ")
    with pytest.raises(FormulaError, match=r"M\(s\) is not among the propositions M\(w\), M\(l\)"):
        Structure.of("M(s)", over=MODEL)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("T='1'", "T holds the row '1': write a 0 or 1 for each of the 2"),
        ("T='12'", "T holds the row '12'"),
        ("over='M(x)'", "over has 'M\\(x\\)', which is not a prediction"),
        ("over='M(w)&Ref(l), M(w)'", "over uses M\\(w\\) twice"),
        ("over='M(w),M(l),M(s),Ref(w),Ref(l),Ref(s),Prev(w)'", "over has 7 propositions, at most 6"),
        ("link='cubic'", "link must be"),
        ("beta=0", "beta must be a positive finite number"),
    ],
)
def test_bad_arguments_are_named(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        parse(f"logic({arguments})")


def test_one_sided_structures_are_made_but_not_trained_on():
    with pytest.raises(ValueError, match="has no row in T: the loss is infinite"):
        Logic("", "01")(likely_batch())
    with pytest.raises(ValueError, match="has no row in B: the loss is 0"):
        Logic("01", "")(likely_batch())


def test_equal_sides_give_log_two_and_no_gradient():
    for rows in ("11,10,01,00", "10"):
        batch = likely_batch(3)
        batch.chosen.logps.requires_grad_()
        output = Logic(rows, rows)(batch)
        assert output.loss.item() == pytest.approx(math.log(2))
        output.loss.backward()
        assert batch.chosen.logps.grad.abs().max() == 0
