#!/usr/bin/env bash
# Everything that is to be known of prefopt on a GPU, in one call of under eight minutes that needs no network:
#
#   bash scripts/gpu/check.sh --wheels FOLDER --out FOLDER       # on a machine with one GPU
#   bash scripts/gpu/check.sh --device cpu --rehearse --out FOLDER
#
# --wheels names the folder that scripts/gpu/fetch_wheels.sh filled; what is in it is installed beside the machine's own
# packages. Without it everything has to be installed. Other options go to scripts/gpu/check.py; --help lists them.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD wheels="" out=""
rest=()
while (($#)); do
    case $1 in
        --wheels) wheels=${2:?}; shift 2 ;;
        --out) out=${2:?}; shift 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
[[ -n $out ]] || { echo "check.sh: --out FOLDER is missing" >&2; exit 2; }
mkdir -p "$out"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
if [[ -n $wheels ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl \
        2>&1 | tee "$out/install.log"
    export PYTHONPATH=$root:$site${PYTHONPATH#"$root"}
fi
python3 scripts/gpu/check.py --out "$out" "${rest[@]}"
