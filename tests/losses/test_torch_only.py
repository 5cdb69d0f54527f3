"""`prefopt.losses` in other people's programs: without transformers or trl installed, and in a bare PyTorch loop."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import torch
from torch import nn

from prefopt.losses import PreferenceBatch, Scores, parse


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_torch_alone():
    loaded = run_python(
        """
        import sys, torch
        before = set(sys.modules)
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"transformers", "trl", "peft", "accelerate", "datasets", "rich", "numpy"}:
                    raise ImportError(name + " is not installed here")
        sys.meta_path.insert(0, Refuse())
        from prefopt.losses import PreferenceBatch, Scores, parse
        one = Scores(torch.zeros(2), torch.ones(2), torch.zeros(2))
        print(float(parse("dpo")(PreferenceBatch(one, one)).loss))
        third_party = {m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)
        print(sorted(m for m in third_party if not m.startswith("_")))
        """
    ).splitlines()
    assert loaded[0].startswith("0.693")
    assert loaded[1] == "['prefopt']"


def test_trains_in_a_bare_pytorch_loop():
    """A softmax over three answers learns the preference 0 > 1 and stays near its reference elsewhere."""
    policy = nn.Parameter(torch.zeros(3))
    reference = torch.log_softmax(torch.zeros(3), 0)
    loss = parse("dpo(beta=0.5) + 0.01*sft")
    optimizer = torch.optim.SGD([policy], lr=0.5)
    history = []
    for _ in range(50):
        logps = torch.log_softmax(policy, 0)
        one = torch.ones(1)
        output = loss(
            PreferenceBatch(
                chosen=Scores(logps[0:1], one, reference[0:1]), rejected=Scores(logps[1:2], one, reference[1:2])
            )
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        history.append(float(output.loss.detach()))
    assert history[-1] < history[0]
    assert torch.argmax(policy) == 0
    assert torch.argmin(policy) == 1
