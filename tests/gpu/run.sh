#!/bin/bash
# Everything that only a GPU can show: its tests, then peak and time of six recipes against `qtuning plan`, whose table
# goes into docs/benchmarks.md with the card's name. Options are those of tests/gpu/measure.py, e.g. --cap_gib 12.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || { echo "tests/gpu/run.sh: there is no GPU." >&2; exit 2; }
python -m pytest tests/gpu -q -n 0
python tests/gpu/measure.py --into docs/benchmarks.md "$@"
