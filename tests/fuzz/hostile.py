"""What gets into files by accident or on purpose, as hypothesis strategies, and a guard against hangs."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

NASTY = (
    "", " ", "\n", "\0", "\u200b", "\u200b\u200b hi", "\ufeff", "\u202eabc\u202c", "\u2028", "שלום", "مرحبا",
    "e\u0301", "👩\u200d👩\u200d👧\u200d👦", "\U0010ffff", "\ud800", "a\udfffb", "<|im_end|>",
    "<|im_start|>assistant\n", "<|endoftext|>",
    "{{ 7 * 7 }}", "{% for %}", "null", "NaN", "x" * 3000, "word " * 700, "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:",
    "'; DROP TABLE rows; --", "../../etc/passwd", "\r\n", '"', "\\", "\x1b[31m", "[red]", "1e999",
)  # fmt: skip

WORDS = st.sampled_from(["the fox", "a bridge", "Paris", "It works.", "no", "yes, it does", "load 3"])
TEXTS = st.one_of(WORDS, WORDS, st.sampled_from(NASTY), st.text(max_size=30))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.sampled_from([10**30, -1, 1e300, -0.0, 2**63])
)
NESTED = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)

ROLES = st.sampled_from(["user", "assistant", "system", "tool", "developer", "function", "", "robot", "User"])
PARTS = st.lists(
    st.one_of(
        TEXTS.map(lambda text: {"type": "text", "text": text}),
        st.just({"type": "image"}),
        st.dictionaries(TEXTS, SCALARS, max_size=2),
    ),
    max_size=3,
)
CALLS = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXTS})}),
    max_size=2,
)


def messages(role: str) -> st.SearchStrategy[Any]:
    """Conversations, most of them what they should be: one message of `role`."""
    good = WORDS.map(lambda text: [{"role": role, "content": text}])
    content = st.one_of(TEXTS, st.none(), PARTS, st.integers())
    odd = st.fixed_dictionaries(
        {"role": st.one_of(ROLES, st.none(), st.integers()), "content": content},
        optional={"tool_calls": st.one_of(CALLS, TEXTS), "name": SCALARS, "weight": SCALARS},
    )
    return st.one_of(good, good, good, st.lists(odd, max_size=4), st.lists(NESTED, max_size=2))


def column(style: str, role: str) -> st.SearchStrategy[Any]:
    usual = TEXTS if style == "text" else messages(role)
    return st.one_of(usual, usual, usual, usual, usual, NESTED)


EXTRA = st.dictionaries(
    st.one_of(
        st.sampled_from(["weight", "margin", "source", "row", "prompt_ids", "chosen_ids", "input_ids", "Prompt", ""]),
        st.sampled_from(["ref_chosen_logps", "label", "images", "messages", "attention_mask", "roles", "examples"]),
        TEXTS,
    ),
    SCALARS,
    max_size=2,
)


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One to five rows of pairs or of labelled completions, in one style, with about one value in six out of place."""
    style = draw(st.sampled_from(["text", "messages"]))
    if draw(st.booleans()):
        fields = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        given = {name: column(style, role) for name, role in fields.items()}
    else:
        fields = {"prompt": "user", "completion": "assistant"}
        given = {name: column(style, role) for name, role in fields.items()}
        given["label"] = st.one_of(st.booleans(), st.booleans(), st.booleans(), SCALARS)
    optional = {
        "weight": st.one_of(st.floats(0, 2), st.floats(0, 2), SCALARS),
        "tools": NESTED,
        "chat_template_kwargs": st.one_of(st.none(), st.dictionaries(TEXTS, SCALARS, max_size=2)),
    }
    kept = {name: optional[name] for name in optional if draw(st.integers(0, 4)) == 0}
    extra = draw(EXTRA) if draw(st.integers(0, 3)) == 0 else {}
    made = draw(st.lists(st.fixed_dictionaries({**given, **kept}), min_size=1, max_size=5))
    return [{**extra, **row} for row in made]


def examples(share: float) -> settings:
    """Settings with a share of the profile's examples, for tests whose examples are slower, or faster, than most."""
    return settings(max_examples=max(5, int(settings().max_examples * share)))


@contextlib.contextmanager
def no_hang(seconds: float = 900) -> Iterator[None]:
    """Ends the whole process with every thread's stack, should what is inside not end."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
