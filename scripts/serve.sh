#!/usr/bin/env bash
# An OpenAI-compatible server on this machine, with `transformers serve` in an environment of its own.
#
#     bash scripts/serve.sh MODEL [PORT]     # a Hub name or a folder; port 8000
#
# MODEL is served from a copy of its folder whose generation_config.json says do_sample: the server takes temperature
# and top_p from a request, but samples only if the model's own settings say so, and answers greedily otherwise.
# VENV names the environment (.serve-venv). Stop it with Ctrl-C.
set -euo pipefail
model=${1:?usage: bash scripts/serve.sh MODEL [PORT]}
port=${2:-8000}
venv=${VENV:-.serve-venv}

if ! "$venv/bin/python" -c "import fastapi, uvicorn, openai, transformers" 2> /dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet "transformers[serving]>=5.8,<6"
fi
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
"$venv/bin/python" - "$model" "$copy" << 'PYTHON'
import json
import sys
from pathlib import Path

from huggingface_hub import snapshot_download

name, copy = sys.argv[1], Path(sys.argv[2])
source = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth"]))
for file in source.iterdir():
    if file.is_file() and file.name != "generation_config.json":
        (copy / file.name).symlink_to(file.resolve())
settings = source / "generation_config.json"
values = json.loads(settings.read_text()) if settings.is_file() else {}
# Nothing may be cut from the distribution that the request did not ask for.
(copy / "generation_config.json").write_text(json.dumps({**values, "do_sample": True, "top_k": 0, "top_p": 1.0}))
PYTHON
echo "serving $model on http://127.0.0.1:$port/v1 as $copy"
"$venv/bin/python" -m transformers.cli.transformers serve "$copy" --host 127.0.0.1 --port "$port"
