"""Which errors end a command line with a message alone, and which with a traceback."""

from __future__ import annotations

import ast
import errno
import os
import pickle
from pathlib import Path

import pytest

import prefopt
from prefopt.catalogue.curves import PlotError
from prefopt.data import DataError
from prefopt.logic import FormulaError
from prefopt.losses import LossError
from prefopt.models.bundled import DemoModelError
from prefopt.models.load import ModelError
from prefopt.models.merge import MergeError
from prefopt.recipe.ready import HubUnreachable
from prefopt.safety.errors import PrefoptError, UsageError, message_of
from prefopt.trainer.finite import NonFiniteError
from prefopt.trainer.publishing import PushError
from prefopt.trainer.saving.checkpoints import CheckpointError

PACKAGE = Path(prefopt.__file__).parent
KINDS = {
    UsageError: ValueError,
    DataError: ValueError,
    LossError: ValueError,
    MergeError: ValueError,
    FormulaError: ValueError,
    PlotError: ValueError,
    CheckpointError: RuntimeError,
    PushError: RuntimeError,
    DemoModelError: RuntimeError,
    ModelError: OSError,
    HubUnreachable: ConnectionError,
    NonFiniteError: FloatingPointError,
}


@pytest.fixture(autouse=True)
def _not_verbose(monkeypatch):
    monkeypatch.delenv("PREFOPT_VERBOSE", raising=False)


@pytest.mark.parametrize(("kind", "base"), KINDS.items())
def test_an_error_for_users_ends_in_its_message_and_stays_what_it_was(kind, base):
    assert message_of(kind("lower the batch size")) == "lower the batch size"
    assert issubclass(kind, base)
    again = pickle.loads(pickle.dumps(kind("lower it")))
    assert (type(again), str(again)) == (kind, "lower it")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT])
def test_the_machines_errors_end_in_a_message_wherever_they_come_from(code):
    error = OSError(code, os.strerror(code), "/runs/model.safetensors")
    assert message_of(error) == f"{error}. PREFOPT_VERBOSE=1 shows where"
    # As safetensors has it.
    assert message_of(Exception(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"))


@pytest.mark.parametrize("kind", ["KeyError", "AttributeError", "TypeError", "ValueError", "RuntimeError"])
def test_a_defect_keeps_its_traceback_though_our_own_code_raised_it(kind):
    with pytest.raises(Exception, match="beta") as caught:
        exec(f"raise {kind}('beta')", {"__name__": "prefopt.losses.base"})
    assert message_of(caught.value) is None


def test_verbose_keeps_every_traceback(monkeypatch):
    monkeypatch.setenv("PREFOPT_VERBOSE", "1")
    assert message_of(UsageError("lower the batch size")) is None


def test_no_secret_is_in_an_error_for_users():
    assert "hunter2" not in str(PrefoptError("cannot read https://me:hunter2@example.com/a.jsonl"))


def raised(path: Path) -> list[str]:
    """The names of the exceptions that a file raises by name."""
    calls = [node.exc for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Raise)]
    return [call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]


NOT_FOR_USERS = {  # plain ValueErrors that are caught where they are raised, or say that our own code is wrong
    "data/json_files.py",
    "scoring/cache.py",
    "analysis/kernel_choice/trial.py",
    "evaluation/judges/base.py",  # a judge that answers so is reported for its sample
    "evaluation/judges/build.py",
    "generation/endpoint.py",
}
EXITS = ("cli/", "recipe/arguments/", "trainer/saving/stops.py")  # the last: SIGTERM ends a process


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_raise_what_their_place_allows(path):
    place, names = path.relative_to(PACKAGE).as_posix(), raised(path)
    if place not in NOT_FOR_USERS:
        assert not {"ValueError", "RuntimeError", "OSError"} & set(names), "raise a PrefoptError or a LossError"
    assert "SystemExit" not in names or place.startswith(EXITS)
