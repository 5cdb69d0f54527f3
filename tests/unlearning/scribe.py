"""A generator for tests of `prepare`: it answers prompts by rules, and can be told to answer badly or to die."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence

from prefopt.generation.samples import PromptRow, Sample, SamplingSettings, sample_seed, stored_settings


def reply_to(prompt: str) -> str:
    """A good reply to a shipped prompt."""
    if "Text:\n" in prompt:
        words = re.findall(r"\w+", prompt.split("Text:\n")[1])[:2]
        return "\n\n".join(f"Question: What does {word} do?\nAnswer: {word} sings." for word in words)
    if "wrong answers" in prompt:
        answer = re.search(r"Right answer: (.*)\.", prompt)[1]  # type: ignore[index]
        return "\n".join(f"{number}. {answer} number {number}." for number in range(1, 6))
    if "Write this answer" in prompt:
        return "So: " + re.search(r"Answer: (.*)", prompt)[1]  # type: ignore[index]
    return "Tell me: " + prompt.strip().splitlines()[-1]


class Scribe:
    """Stands in for a generator.

    Args:
        reply: the reply to a prompt in an attempt, and whether it was finished if that is a pair.
        dies_after: prompts after which it kills its process; None never.
    """

    name = "scribe"
    chunk_prompts = 2

    def __init__(
        self, reply: Callable[[str, int], str | tuple[str, bool]] | None = None, dies_after: int | None = None
    ):
        self.reply = reply or (lambda prompt, attempt: reply_to(prompt))
        self.dies_after = dies_after
        self.asked: list[str] = []

    def sample(
        self, prompts: Sequence[PromptRow], settings: SamplingSettings, round_number: int = 0
    ) -> Iterator[list[Sample]]:
        for row in prompts:
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            text = row.prompt if isinstance(row.prompt, str) else row.prompt[0]["content"]
            self.asked.append(text)
            reply = self.reply(text, round_number)
            words, finished = (reply, True) if isinstance(reply, str) else reply
            seed = sample_seed(settings.seed, round_number, row.id, 0)
            facts = stored_settings(settings)
            yield [Sample(row.id, row.prompt, 0, words, 1, finished, round_number, seed, facts, self.name)]

    def close(self) -> None:
        pass
