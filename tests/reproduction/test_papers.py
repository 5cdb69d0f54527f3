"""The papers' files: complete, and in agreement with the experiments and the shipped configurations."""

from __future__ import annotations

import importlib
import re
import shlex
from collections import defaultdict

import pytest

from prefopt.reproduction.paper import PaperError, read_paper, read_papers, select
from prefopt.reproduction.stored import EXPERIMENTS
from prefopt.safety.errors import UsageError
from prefopt.safety.shipped import SHIPPED

PAPERS = read_papers()
MISSION = {
    *("hdpo", "pairwise_cringe", "npo", "dpo_kernels", "rpo", "irpo", "hypo", "inpo", "discopop", "superhf", "blur"),
    *("logic", "entanglement"),
}


def test_the_thirteen_papers_of_the_mission_are_there():
    assert {paper.name for paper in PAPERS if paper.mission} == MISSION
    assert all(paper.experiments(quick=True) for paper in PAPERS if paper.mission)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_every_experiment_exists_and_every_claim_has_a_scale(paper):
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert paper.title != paper.short, "prefopt.catalogue.papers does not know it"
    for name in paper.experiments(quick=False):
        module, function = name.split(".")
        assert callable(getattr(importlib.import_module(f"{EXPERIMENTS}.{module}"), function))
    assert all(claim.scale for claim in paper.claims if claim.experiment)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_commands_at_full_size_name_files_that_ship(paper):
    for config in paper.configs:
        assert (SHIPPED / config).is_file(), config
    for command in paper.commands:
        words = shlex.split(command)
        assert words[0] in ("prefopt", "accelerate"), command
        for word in words:
            if word.startswith(("configs/", "recipes/")):
                assert (SHIPPED / word).is_file(), command


def test_an_experiment_is_quick_or_full_for_all_its_claims():
    kinds = defaultdict(set)
    for paper in PAPERS:
        for claim in paper.claims:
            if claim.experiment:
                kinds[claim.experiment].add(claim.run)
    assert {name: kind for name, kind in kinds.items() if len(kind) > 1} == {}


def test_the_claims_of_an_experiment_are_those_in_its_code():
    """Every id that a module returns is a claim of some paper, and the reverse."""
    wanted = defaultdict(set)
    for paper in PAPERS:
        for claim in paper.claims:
            if claim.experiment:
                wanted[claim.experiment.split(".")[0]].add(claim.id)
    for module, ids in wanted.items():
        text = importlib.import_module(f"{EXPERIMENTS}.{module}").__loader__.get_source(f"{EXPERIMENTS}.{module}")
        written = set(re.findall(r'Outcome\(\s*f?"([^"]+)"', text))
        patterns = [re.compile(re.sub(r"\\{.*?\\}", ".+", re.escape(each))) for each in written]
        assert [each for each in ids if not any(p.fullmatch(each) for p in patterns)] == [], module
        assert [p.pattern for p in patterns if not any(p.fullmatch(each) for each in ids)] == [], module


def test_papers_are_found_by_name_usual_name_and_number():
    assert [paper.name for paper in select(["hdpo", "H-DPO", "2411.07595", "npo"])] == ["hdpo", "npo"]
    assert len(select([])) == len(PAPERS)
    with pytest.raises(UsageError, match="Did you mean 'hdpo'"):
        select(["hdp"])


GOOD = """
short: X
arxiv: '0000.00000'
claims:
- {id: a, statement: s, source: p, number: n, tolerance: t, experiment: e.f, check: [{number: v, below: 1}]}
"""


def test_a_file_is_read(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(GOOD)
    paper = read_paper(file)
    assert (paper.name, paper.mission, paper.claims[0].check[0].rule) == ("x", False, "below")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("short: X", "shrot: X", "no field is called 'shrot'. Did you mean 'short'"),
        ("short: X", "", "'short' is missing"),
        ("statement: s, ", "", "claim 'a': 'statement' is missing"),
        ("experiment: e.f, ", "", "needs either `experiment`, or `cannot`"),
        ("experiment: e.f", "experiment: e.f, cannot: c", "needs either `experiment`, or `cannot`"),
        ("tolerance: t, ", "", "needs `tolerance`"),
        ("experiment: e.f", "experiment: e.f, run: slow", "quick or full"),
        ("below: 1", "beneath: 1", "a check has `number` and one of"),
        ("- {id: a", "- {id: a, statement: s, source: p, number: n, cannot: c}\n- {id: a", "two claims have the id"),
        ("short: X", "- [", "x.yaml"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, old, new, message):
    file = tmp_path / "x.yaml"
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(PaperError, match=re.escape(message)):
        read_paper(file)
