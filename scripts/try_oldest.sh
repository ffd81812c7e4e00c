#!/bin/sh
# Run a job with the oldest versions that pyproject.toml allows, in an environment that is thrown away.
#
#   scripts/try_oldest.sh .venv/bin/python models
set -eu
python=$1 models=$(realpath "$2") root=$(pwd)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/uv"
"$folder/uv/bin/pip" --disable-pip-version-check --quiet install uv
"$python" -m venv "$folder/oldest"
"$folder/uv/bin/uv" pip install --quiet --python "$folder/oldest/bin/python" --resolution lowest-direct "$root[cpu,gguf]"
cd "$folder"
for quant in none int8 nf4; do
    "$folder/oldest/bin/python" -m pipeline model=smollm2 quant=$quant models_dir="$models" \
        prompts=jokes.jsonl limit=2 generation.max_new_tokens=8
done
