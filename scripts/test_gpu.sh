#!/usr/bin/env bash
# The tests that need a CUDA device, and the cost of a training step there; without a device the tests are skipped.
#
#     bash scripts/test_gpu.sh [report.md]
#
# PYTHON: an interpreter with the development dependencies (python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python}
report=${1:-/dev/null}
export PYTHONPATH=$PWD
{
    printf '# GPU\n\n`bash scripts/test_gpu.sh`, %s\n\n```\n' "$(date -u +%F)"
    "$python" -c 'import torch, platform
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"Python {platform.python_version()}, torch {torch.__version__}; {name}")'
    status=0
    "$python" -m pytest -q -rs --disable-warnings -p no:cacheprovider -m gpu tests || status=1
    if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        "$python" benchmarks/overhead.py --device cuda || status=1
    else
        echo "benchmarks/overhead.py --device cuda: not run, there is no CUDA device"
    fi
    echo '```'
    exit $status
} 2>&1 | tee "$report"
