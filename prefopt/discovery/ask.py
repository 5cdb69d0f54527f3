"""Proposals of a language model behind an OpenAI-compatible endpoint, which sees the archive's best and its failures.

What it answers is text for `read`, and is never run. An answer without an expression, or no answer, is a proposal
that the archive refuses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefopt.discovery.archive import Archive
from prefopt.discovery.evolve import Member, Proposal
from prefopt.discovery.grammar import BATCH_FUNCTIONS, FUNCTIONS, SIGNS
from prefopt.discovery.levels import TOY
from prefopt.discovery.ranking import scores
from prefopt.generation.endpoint import Client, Endpoint, ServerError, read_completion
from prefopt.safety.errors import UsageError

PROMPT = Path(__file__).parent / "prompt.md"
_BEST, _REFUSED = 12, 8
_MARK = "LOSS:"


class ServerProposer:
    """Asks a server for expressions.

    Args:
        endpoint: where it is.
        model: the name that the server knows the model by.
        share: of the proposals, the rest is evolution's; in (0, 1].
        prompt: file of the prompt, in which {{operations}}, {{best}} and {{refused}} are filled in.
        batchwise: whether statistics of the batch are offered.
        temperature: of the answers.
        max_tokens: of an answer.
        say: called with a line for each failed attempt.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        share: float = 0.5,
        prompt: Path = PROMPT,
        batchwise: bool = False,
        temperature: float = 1.0,
        max_tokens: int = 2048,
        say: Callable[[str], None] = print,
    ):
        if not 0 < share <= 1:
            raise UsageError(f"--share must be above 0 and at most 1, got {share}")
        if not prompt.is_file():
            raise UsageError(f"--prompt: there is no file {prompt}")
        self.share, self._model, self._batchwise = share, model, batchwise
        self._template = prompt.read_text(encoding="utf-8")
        self._settings = {"temperature": temperature, "max_tokens": max_tokens}
        self._client = Client(endpoint, say)

    def ask(self, archive: Archive, members: Sequence[Member], numbers: Sequence[int]) -> dict[int, Proposal]:
        """One proposal for each number, asked for at once; all see the archive before the first number."""
        message = self.message(archive, members, numbers[0])
        return dict(zip(numbers, self._client.in_order(numbers, lambda n: self._one(message, n)), strict=True))

    def close(self) -> None:
        self._client.close()

    def message(self, archive: Archive, members: Sequence[Member], before: int) -> str:
        """The prompt for the candidates from a number on."""
        scored = scores(archive.results(TOY.name)) if members else {}
        best = [
            f"- {member.node}  value {score.value:.3f}, reward at equal KL {score.reward_at_kl:.3f}, "
            f"length {score.length_at_kl:.2f}"
            for member in members[:_BEST]
            if (score := scored.get(member.number)) is not None
        ]
        rows = archive.candidates("id < ? AND level IN ('text', 'static') AND reason <> ''", [before])[-_REFUSED:]
        # As JSON: what a model wrote cannot end the list or begin a heading.
        refused = [f"- {json.dumps(row.text[:200])}: {row.reason}" for row in rows]
        filled = self._template.replace("{{operations}}", _operations(self._batchwise))
        filled = filled.replace("{{best}}", "\n".join(best) or "- none")
        return filled.replace("{{refused}}", "\n".join(refused) or "- none")

    def _one(self, message: str, number: int) -> Proposal:
        body: dict[str, Any] = {
            "model": self._model, "messages": [{"role": "user", "content": message}], "seed": number, **self._settings
        }  # fmt: skip
        who = f"server: {self._model}"
        try:
            completion = self._client.post("chat/completions", body, read_completion)
        except ServerError as error:
            return Proposal("", who, reason=f"the server did not answer: {error}"[:300])
        return Proposal(expression_in(completion.text), who)


def expression_in(answer: str) -> str:
    """The expression of an answer: what follows the last `LOSS:`, or all of it; without marks of code."""
    lines = [line.strip().strip("*`").strip() for line in answer.splitlines()]
    marked = [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]
    return (marked[-1] if marked else answer).strip().strip("*`").strip()


def _operations(batchwise: bool) -> str:
    named = {**FUNCTIONS, **(BATCH_FUNCTIONS if batchwise else {})}
    calls = [
        f"- {name}({', '.join('abc'[: len(operation.takes)])}): {operation.means}"
        for name, operation in named.items()
        if name != "where"
    ]
    signs = [f"- a {name} b: {operation.means}" for name, operation in SIGNS.items()]
    return "\n".join([*signs, "- -a", *calls, f"- {FUNCTIONS['where'].means}"])
