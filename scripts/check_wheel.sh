#!/usr/bin/env bash
# Builds the sdist, and the wheel from it, installs the wheel into a bare environment and uses it in an empty folder:
# help, losses, a check of data, two steps of training, a recipe and a config of one's own, types.
#   bash scripts/check_wheel.sh
# About three minutes on two cores, most of them the install and the types. Downloads the bundled model if it is not in the cache.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1

echo "== build"
python3 -m venv "$work/build"
"$work/build/bin/pip" install -q -c "$root/constraints.txt" build
"$work/build/bin/python" -m build --outdir "$work/dist" "$root" > "$work/build.log" || { cat "$work/build.log"; exit 1; }
ls -sh "$work"/dist/*
tar tzf "$work"/dist/*.tar.gz | cut -d/ -f2- > "$work/sdist"
allowed='^((prefopt|configs|recipes)/.*|(README|CHANGELOG)\.md|LICENSE|PKG-INFO|pyproject\.toml|hatch_build\.py|\.gitignore)$'
if grep -vE "$allowed" "$work/sdist" || grep -E '__pycache__|\.pyc$' "$work/sdist"; then
    echo "the sdist should not have these files"
    exit 1
fi

echo "== install into a bare environment"
python3 -m venv "$work/bare"
export PATH="$work/bare/bin:$PATH"
pip install -q -c "$root/constraints.txt" "$work"/dist/*.whl
pip check

mkdir "$work/empty"
cd "$work/empty"
run() {
    echo "-- $*"
    "$@" > "$work/out" 2>&1 || { cat "$work/out"; exit 1; }
}

echo "== commands"
run prefopt --version
run prefopt --help
run python -m prefopt losses
run prefopt losses simpo
python - > pairs.jsonl << 'END'
import json
for i in range(8):
    row = {"prompt": f"What is {i} plus 1?", "chosen": f"It is {i + 1}.", "rejected": "Let me think about that for a while."}
    print(json.dumps(row))
END
run prefopt check pairs.jsonl
run prefopt train --config papers/dpo_hh.yaml --demo --dry_run
run prefopt train --dataset_name pairs.jsonl --eval_rows 2 --use_peft --max_steps 2 --per_device_train_batch_size 2 \
    --output_dir trained
for file in adapter_model.safetensors results.json README.md; do test -s "trained/$file"; done
grep -q '"after"' trained/results.json
run prefopt new recipe dpo --out mine.py
run prefopt new config simpo --out mine.yaml
run python mine.py --config mine.yaml --demo --dry_run

echo "== types"
pip install -q -c "$root/constraints.txt" mypy
cat > typed.py << 'END'
from prefopt.losses import DPO, PreferenceBatch, Scores

def value(chosen: Scores, rejected: Scores) -> float:
    return float(DPO(beta=0.1)(PreferenceBatch(chosen=chosen, rejected=rejected)).loss)
END
run mypy --strict typed.py
echo "The wheel works."
