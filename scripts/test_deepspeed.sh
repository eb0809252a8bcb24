#!/usr/bin/env bash
# Trains with DeepSpeed on two processes of the CPU: tests/distributed/test_zero.py. Makes an environment of its own, since
# DeepSpeed is no requirement of the other tests.
#
#     bash scripts/test_deepspeed.sh [report.md]
#
# DEEPSPEED_VENV: where the environment is (.venv-deepspeed); PYTHON: the interpreter that makes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${DEEPSPEED_VENV:-.venv-deepspeed}
if [ ! -x "$venv/bin/pytest" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet -r requirements.txt
    DS_BUILD_OPS=0 "$venv/bin/pip" install --quiet "deepspeed>=0.18"
fi
export DS_ACCELERATOR=cpu PYTHONPATH=$PWD

status=0
report=${1:-/dev/null}
{
    printf '# DeepSpeed\n\n`bash scripts/test_deepspeed.sh` on CPUs, %s\n\n```\n' "$(date -u +%F)"
    "$venv/bin/python" -W ignore -c 'import platform, accelerate, deepspeed, torch
print(f"Python {platform.python_version()}, torch {torch.__version__}, deepspeed {deepspeed.__version__}, "
      f"accelerate {accelerate.__version__}")' 2> /dev/null
    "$venv/bin/python" -m pytest -q -p no:cacheprovider tests/distributed/test_zero.py 2>&1 || status=1
    echo '```'
    exit $status
} | tee "$report"
