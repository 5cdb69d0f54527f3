"""A language model as proposer, against a stand-in endpoint: what it sees, and what its answers cost."""

from __future__ import annotations

import pytest

from prefopt.discovery import search as module
from prefopt.discovery.archive import Archive
from prefopt.discovery.ask import ServerProposer, expression_in
from prefopt.discovery.levels import ToyLevel
from prefopt.discovery.search import Search, SearchOptions
from prefopt.generation.endpoint import Endpoint
from prefopt.safety.errors import UsageError
from tests.generation.stand_in import running


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "SCREEN", ToyLevel("screen", (0.1,), (0,), 4))
    monkeypatch.setattr(module, "TOY", ToyLevel("toy", (0.1, 0.5), (0,), 6))


@pytest.fixture
def server():
    with running() as stand_in:
        yield stand_in


def search(folder, server, candidates=9, share=1.0):
    lines = []
    proposer = ServerProposer(
        Endpoint(server.url, attempts=2, first_wait=0.01), "teacher", share=share, say=lines.append
    )
    archive = Archive(folder)
    options = SearchOptions(folder, candidates=candidates, generation=6)
    Search(options, archive, proposer, say=lambda line: None).run()
    proposer.close()
    return archive.candidates(), lines


ANSWERS = [
    "A steeper one.\n\nLOSS: softplus(-2 * x) + 0.1 * relu(-x)",
    "```python\nimport os\nos.system('true')\n```",
    "LOSS: inf * x",
    "LOSS: " + "softplus(" * 1200,
    "",
    "I would rather not.",
]


def test_each_answer_costs_one_line_and_a_good_one_is_trained(tmp_path, server):
    server.complete = lambda body: ANSWERS[body["seed"] % 6]
    rows, _ = search(tmp_path, server)
    by_answer = {row.id % 6: row for row in rows[3:]}
    assert len(rows) == 9
    assert {row.proposer for row in rows[3:]} == {"server: teacher"}
    assert by_answer[0].expression == "softplus(-2 * x) + 0.1 * relu(-x)"
    assert by_answer[0].level == "toy"
    assert [by_answer[n].level for n in range(1, 6)] == ["text"] * 5
    assert "nothing is named 'inf'" in by_answer[2].reason
    assert "has 10800 characters" in by_answer[3].reason
    assert by_answer[4].reason == "the proposer answered nothing"
    assert len(by_answer[3].text) <= 2000


@pytest.mark.parametrize("how", [503, "close", "cut", "broken", "empty"])
def test_a_server_that_fails_costs_a_line_with_its_reason(tmp_path, server, how):
    server.fail = lambda body, earlier: how if body["seed"] == 5 else None
    server.complete = lambda body: f"LOSS: softplus(-{body['seed']} * x)"
    rows, lines = search(tmp_path, server, candidates=7)
    assert len(rows) == 7
    assert [row.id for row in rows if row.level == "text"] == [5]
    assert "the server did not answer" in rows[5].reason
    assert "2 attempts failed" in rows[5].reason
    assert len(lines) == 1
    assert {body["seed"] for _, body in server.requests} == {3, 4, 5, 6}


def test_a_share_of_the_proposals_is_the_servers(tmp_path, server):
    server.complete = lambda body: f"LOSS: softplus(-{body['seed']} * x)"
    rows, _ = search(tmp_path, server, candidates=15, share=0.5)
    asked = [row.proposer.startswith("server") for row in rows[3:]]
    assert asked.count(True) == 6


def test_it_sees_the_best_and_the_refused(tmp_path, server):
    texts = {3: "LOSS: softplus(x)", 4: 'LOSS: import "os"\n'}
    server.complete = lambda body: texts.get(body["seed"], f"LOSS: softplus(-{body['seed']} * x)")
    search(tmp_path, server, candidates=15)
    message = next(body["messages"][0]["content"] for _, body in server.requests if body["seed"] == 9)
    first = next(body["messages"][0]["content"] for _, body in server.requests if body["seed"] == 3)
    assert "- softplus(-x)  value 0." in first
    assert "most recent last:\n\n- none" in first
    assert "it does not push the chosen answer up" in message
    assert '- "import \\"os\\"": column' in message
    assert "- softplus(-5 * x)  value" in message
    assert "- where(a > b, c, d): c if a > b, else d" in message
    assert "batch_mean" not in message
    assert "{{" not in message


@pytest.mark.parametrize(
    ("answer", "expression"),
    [
        ("LOSS: exp(-x)", "exp(-x)"),
        ("**LOSS: `exp(-x)`**", "exp(-x)"),
        ("LOSS: x\nno, better:\nLOSS: exp(-x)", "exp(-x)"),
        ("`exp(-x)`", "exp(-x)"),
        ("", ""),
    ],
)
def test_where_the_expression_stands(answer, expression):
    assert expression_in(answer) == expression


def test_options_are_checked(tmp_path):
    with pytest.raises(UsageError, match="--share"):
        ServerProposer(Endpoint("http://localhost:1/v1"), "m", share=0.0)
    with pytest.raises(UsageError, match="--prompt"):
        ServerProposer(Endpoint("http://localhost:1/v1"), "m", prompt=tmp_path / "none.md")
