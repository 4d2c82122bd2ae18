#!/usr/bin/env bash
# For an image whose site-packages cannot be written, and whose interpreter has to be the one that trains: the plugin in
# a folder of its own. Python reads no .pth files there, so the variable alone would turn nothing on: train with
#
#     PYTHONPATH=/shared/plugin python -m megatron_fp32_router run pretrain_gpt.py ARGUMENTS…
#     PYTHONPATH=/shared/plugin torchrun … -m megatron_fp32_router run pretrain_gpt.py ARGUMENTS…
#
# Run this once:
#
#     examples/read-only/target.sh /shared/plugin megatron_fp32_router-0.1.0-py3-none-any.whl
set -euo pipefail
folder=${1:?a folder to make} wheel=${2:?the wheel of the plugin, or its name on an index}

"${PYTHON:-python}" -m pip install --quiet --target "$folder" "$wheel"
