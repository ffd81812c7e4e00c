#!/bin/sh
# Make the environment of engine=vllm, outside the checkout, with the pinned versions; where it is there, nothing.
#
#   scripts/setup_vllm.sh               PYTHON=python3.12 chooses one
set -eu
venv=${XDG_CACHE_HOME:-$HOME/.cache}/llm-job-pipeline/vllm
pins=scripts/vllm-cpu.txt
if nvidia-smi --list-gpus > /dev/null 2>&1; then
    pins=scripts/vllm-gpu.txt
fi
made=$venv/$(basename "$pins") # a copy of what it was made from, written last
if cmp -s "$pins" "$made" && "$venv/bin/python" -c '' 2> /dev/null; then
    exit 0
fi

rm -rf "$venv"
mkdir -p "$(dirname "$venv")"
scripts/setup_venv.sh "$venv"
no_deps=
[ "$pins" = scripts/vllm-gpu.txt ] || no_deps=--no-deps
"$venv/bin/python" -m pip --disable-pip-version-check --quiet install $no_deps --requirement "$pins"
"$venv/bin/python" -c 'import vllm' > /dev/null
cp "$pins" "$made"
echo "vLLM is in $venv"
