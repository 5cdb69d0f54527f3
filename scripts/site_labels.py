"""For the site's API reference: `Needs:`, `Limits:` and the like in docstrings of losses begin a paragraph each."""

from __future__ import annotations

import re
from typing import Any

import griffe

LABEL = re.compile(r"\n(?=[ \t]*(?:Needs|Limits|Numerics|Numerical note|Reference|Rewards are|State):? )")


class Labels(griffe.Extension):
    """Puts an empty line before each label."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = LABEL.sub("\n\n", obj.docstring.value)
