"""The generator of a round: the policy as it is now, in memory while it samples and gone before training."""

from __future__ import annotations

from typing import Protocol

from prefopt.generation.samples import Generator
from prefopt.generation.transformers import TransformersGenerator
from prefopt.recipe import Recipe
from prefopt.recipe.build import load_to_sample
from prefopt.recipe.ready import Ready


class Generators(Protocol):
    """Makes the generator of a model."""

    def open(self, model: str) -> Generator:
        """The generator of a model, a folder or a Hub name; the one opened last stays until `close`."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class InMemory:
    """Generators of models in memory, one at a time.

    Args:
        recipe: the options.
        ready: the initial model, for the tokenizer and how to load models.
    """

    def __init__(self, recipe: Recipe, ready: Ready):
        self._recipe, self._ready = recipe, ready
        self._opened: tuple[str, TransformersGenerator] | None = None

    def open(self, model: str) -> Generator:
        if self._opened is None or self._opened[0] != model:
            self.close()
            self._opened = (
                model,
                TransformersGenerator(load_to_sample(model, self._recipe, self._ready), self._ready.tokenizer),
            )
        return self._opened[1]

    def close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None
