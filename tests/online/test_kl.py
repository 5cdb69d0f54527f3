"""KL to the initial model: which tokens are scored, and that the estimate is the one of its formula."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.generation.samples import PromptRow, Sample, SamplingSettings
from prefopt.online import kl
from prefopt.online.kl import CompletionLogps, kl_numbers, kl_sampling, score_completions
from tests.tiny import make_model, make_tokenizer

CHAT = PromptRow([{"role": "user", "content": "hello there"}])
TEXT = PromptRow("the quick brown")


def sample(row: PromptRow, completion: str, finished: bool = True, index: int = 0) -> Sample:
    return Sample(row.id, row.prompt, index, completion, 3, finished)


def direct(model, ids, count) -> float:
    """The log-probability of the last `count` ids."""
    with torch.no_grad():
        logps = model.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logps[at - 1, ids[at]]) for at in range(len(ids) - count, len(ids)))


def test_completions_are_scored_with_their_end_if_they_have_one():
    tokenizer, policy, start = make_tokenizer(), make_model("llama", seed=1), make_model("llama", seed=0)
    samples = [sample(CHAT, "good day"), sample(TEXT, "fox", finished=False), sample(TEXT, "fox", index=1)]
    scored = score_completions(samples, [CHAT, TEXT], tokenizer, [lambda: policy, lambda: start])
    end = tokenizer.eos_token_id
    chat = tokenizer.apply_chat_template(CHAT.prompt, add_generation_prompt=True, return_dict=False)
    text = tokenizer(TEXT.prompt)["input_ids"]
    good, fox = (tokenizer(words, add_special_tokens=False)["input_ids"] for words in ("good day", "fox"))
    for one, prompt, completion in zip(scored, (chat, text, text), ([*good, end], fox, [*fox, end]), strict=True):
        assert one.tokens == len(completion)
        assert one.logp == pytest.approx(direct(policy, prompt + completion, len(completion)), abs=1e-4)
        assert one.ref_logp == pytest.approx(direct(start, prompt + completion, len(completion)), abs=1e-4)
    cut = score_completions(samples, [CHAT, TEXT], tokenizer, [lambda: policy] * 2, stop=["\n"])
    assert [one.tokens for one in cut] == [len(good), len(fox), len(fox)]
    assert all(one.logp == one.ref_logp for one in cut)


def test_an_empty_completion_without_an_end_says_nothing():
    policy, start = make_model("llama", seed=1), make_model("llama", seed=0)
    loads = [lambda: policy, lambda: start]
    (one,) = score_completions([sample(TEXT, "", finished=False)], [TEXT], make_tokenizer(), loads)
    assert (one.tokens, one.logp, one.ref_logp) == (0, 0.0, 0.0)


def test_the_estimate_is_the_mean_over_prompts_with_its_standard_error():
    pairs = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): -1.0, ("b", 1): 1.0}  # prompts: 2 and 0
    scored = [CompletionLogps(p, i, 5, -10 + difference, -10.0) for (p, i), difference in pairs.items()]
    assert kl_numbers(scored) == {"mean": 1.0, "standard_error": pytest.approx(1.0), "completions": 4}
    assert kl_numbers(scored[:1]) == {"mean": 1.0, "standard_error": None, "completions": 1}


def test_the_estimate_agrees_with_the_exact_kl_of_one_token():
    tokenizer, policy, start = make_tokenizer(), make_model("llama", seed=1), make_model("llama", seed=0)
    ids = tokenizer(TEXT.prompt)["input_ids"]
    with torch.no_grad():
        of_policy, of_start = (
            m.eval()(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for m in (policy, start)
        )
    words = {n: tokenizer.decode([n]) for n in range(len(of_policy))}
    single = [n for n, text in words.items() if tokenizer(text, add_special_tokens=False)["input_ids"] == [n]]
    samples = [sample(TEXT, words[n], finished=False, index=place) for place, n in enumerate(single)]
    scored = score_completions(samples, [TEXT], tokenizer, [lambda: policy, lambda: start])
    mass = [math.exp(one.logp) for one in scored]
    weighted = sum(p * (one.logp - one.ref_logp) for p, one in zip(mass, scored, strict=True))
    exact = (of_policy.exp() * (of_policy - of_start))[single].sum()
    assert weighted == pytest.approx(float(exact), abs=1e-5)
    assert len(single) > 10


def test_completions_come_from_the_whole_distribution():
    greedy = SamplingSettings(1, 0.0, max_new_tokens=8, seed=3)
    assert kl_sampling(greedy) == SamplingSettings(1, 1.0, max_new_tokens=8, seed=3)
    drawn = SamplingSettings(4, 1.0, max_new_tokens=8, seed=3)
    assert kl_sampling(drawn) == drawn
    assert kl_sampling(SamplingSettings(4, 1.0, top_k=5)) == SamplingSettings(1, 1.0)


def test_batches_are_the_same_for_any_number_of_processes(monkeypatch):
    """Each process scores whole batches; together they have them all, in order."""
    policy, start, tokenizer = make_model("llama", seed=1), make_model("llama", seed=0), make_tokenizer()
    samples = [sample(TEXT, "fox " * (1 + index % 5), index=index) for index in range(20)]
    monkeypatch.setattr(kl, "ROWS_AT_ONCE", 3)

    class Processes:
        num_processes, process_index = 2, 0

    def both(sums):
        parts.append(sums)
        return sums

    whole = score_completions(samples, [TEXT], tokenizer, [lambda: policy, lambda: start])
    parts: list = []
    monkeypatch.setattr(kl, "gather_object", both)
    monkeypatch.setattr(kl, "PartialState", Processes)
    rows = kl._rows(samples, [TEXT], tokenizer, ())
    for index in range(2):
        Processes.process_index = index
        kl._summed_logps(lambda: policy, rows, tokenizer)
    joined = [value for _, values in sorted(parts[0] + parts[1]) for value in values]
    assert joined == [one.logp for one in whole]
