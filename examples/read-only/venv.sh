#!/usr/bin/env bash
# For an image whose site-packages cannot be written: an environment of your own on top of it, on storage that every
# node sees. It has all that the image has, and the plugin. Run this once; it prints the interpreter to train with.
#
#     examples/read-only/venv.sh /shared/plugin-env megatron_fp32_router-0.1.0-py3-none-any.whl
set -euo pipefail
folder=${1:?a folder to make} wheel=${2:?the wheel of the plugin, or its name on an index}

"${PYTHON:-python}" -m venv --system-site-packages "$folder"
"$folder/bin/python" -m pip install --quiet "$wheel"
echo "$folder/bin/python"
