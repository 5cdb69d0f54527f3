#!/usr/bin/env bash
# Wheels for a machine without a network that has torch, transformers, accelerate and peft but not the rest:
#
#   bash scripts/gpu/fetch_wheels.sh FOLDER [PYTHON_VERSION]     # 3.12 unless another is named
#
# prefopt's own wheel is among them for its name and version; scripts/gpu/check.sh imports the working tree.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:?"usage: fetch_wheels.sh FOLDER [PYTHON_VERSION]"}
python=${2:-3.12}
mkdir -p "$folder"

# The versions of constraints.txt. trl, datasets and what they need that torch and transformers do not.
missing=(trl datasets dill multiprocess xxhash gguf)
pins=()
for name in "${missing[@]}"; do
    pins+=("$(grep -iE "^$name==" constraints.txt | head -1)")
done
platforms=()
for glibc in 28 27 24 17; do
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 -d "$folder" "${pins[@]}"
python3 -m pip wheel -q --no-deps -w "$folder" .
ls -l "$folder"
du -sh "$folder"
