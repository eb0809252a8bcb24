#!/usr/bin/env bash
# Trains on an XLA device: tests/xla, and tests of the core with accelerator="tpu". Without a TPU it is XLA's client for
# CPUs (PJRT_DEVICE=CPU). Makes an environment of its own, since torch_xla wants the torch of its own release.
#
#     bash scripts/test_xla.sh [report.md]
#
# XLA_VENV: where the environment is (.venv-xla); PJRT_DEVICE: CPU (default) or TPU; PYTHON: 3.10 to 3.13.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${XLA_VENV:-.venv-xla}
if [ ! -x "$venv/bin/pytest" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet "torch==2.9.0" "torch_xla==2.9.0" accelerate numpy safetensors xxhash typing_extensions \
        rich tensorboard torchmetrics matplotlib scikit-learn pytest hypothesis psutil
fi
export PJRT_DEVICE=${PJRT_DEVICE:-CPU} LIGHTDECO_TEST_ACCELERATOR=tpu PYTHONPATH=$PWD

# Left out: comparisons with a loop by hand on the CPU, tensors that a test itself makes on the CPU, counts of warnings
# (accelerate calls a deprecated function of torch_xla), and LBFGS, whose updates XLA compiles for minutes.
left_out='by_hand or hand_written or lbfgs or tried_again or torchmetrics_objects or batch_transfers or one_output_per_batch
    or inference_mode_can or accumulated_gradients_of or a_carry_of_its_own'
core=(tests/test_fit.py tests/test_resume.py tests/test_evaluate.py tests/test_optim.py tests/test_metrics.py
    tests/test_logging.py tests/test_saving.py tests/test_load_from_checkpoint.py tests/test_precision.py
    tests/test_several.py)

status=0
run() {
    echo "\$ $*"
    "$venv/bin/python" -m pytest -q -p no:cacheprovider -W error -W "ignore:Use torch_xla:DeprecationWarning" "$@" || status=1
    echo
}
report=${1:-/dev/null}
{
    printf '# XLA\n\n`bash scripts/test_xla.sh`, PJRT_DEVICE=%s, %s\n\n```\n' "$PJRT_DEVICE" "$(date -u +%F)"
    "$venv/bin/python" -c 'import torch, torch_xla, accelerate, platform
print(f"Python {platform.python_version()}, torch {torch.__version__}, torch_xla {torch_xla.__version__}, "
      f"accelerate {accelerate.__version__}; devices: {torch_xla.devices()}")'
    run tests/xla
    run "${core[@]}" -k "not (${left_out//$'\n'/ })"
    echo '```'
    exit $status
} 2>&1 | tee "$report"
