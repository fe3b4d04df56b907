#!/usr/bin/env bash
# What do our training steps reach on this machine's GPU, at full size, against the reference loops?
#
#   benchmarks/gpu_suite.sh                      # ten minutes at most; everything to benchmarks/results/gpu_suite.json
#   benchmarks/gpu_suite.sh FOLDER               # the JSON goes to another folder
#   benchmarks/gpu_suite.sh FOLDER --only pairs  # some of the benchmarks
#   WHEELS=wheels benchmarks/gpu_suite.sh        # packages that the machine lacks, from a folder of wheels
#   PYTHON=python3.12 benchmarks/gpu_suite.sh    # another interpreter
#
# It runs the matrix product that MFU is measured against, then the benchmarks step_medsam, step_sam3, step_sam2, pairs,
# attention, memory and matcher, each in a process and a time of its own; one that fails or has no time left is a line,
# and the others go on. Without a GPU all of them run at tiny sizes, in one or two minutes: that shows that nothing is
# missing, and no speed. Ends with 1 where one of them failed.
#
# Our package need not be installed: it is taken from this repository. The machine needs torch (2.11 or newer),
# torchvision, transformers (5.17 or newer), lightning, peft, timm, scipy, numpy, safetensors and PyYAML. Wheels to carry
# besides, where it has none (pip download --no-deps, for its Python and platform):
#   zstandard pycocotools                      everything: our batches
#   segment-anything monai                     step_medsam, pairs: the reference
#   jsonargparse fsspec rich                   step_medsam: compiled blocks (the callback)
#   sam2 hydra-core omegaconf antlr4-python3-runtime iopath portalocker tqdm monai
#                                              step_sam2 (sam2 is built beforehand: SAM2_BUILD_CUDA=0 pip wheel)
set -u -o pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
out=${1:-$here/results}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

paths=$(dirname "$here")
if [[ -n ${WHEELS:-} ]]; then
  shopt -s nullglob
  wheels=("$WHEELS"/*.whl)
  if ((${#wheels[@]} == 0)); then
    echo "gpu_suite: $WHEELS holds no wheels: name a folder of *.whl, or leave WHEELS out" >&2
    exit 2
  fi
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --target "$scratch/site" "${wheels[@]}" || {
    echo "gpu_suite: the wheels in $WHEELS cannot be installed: is each for this Python, and there once?" >&2
    exit 2
  }
  paths=$paths:$scratch/site
fi
export PYTHONPATH=$paths${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out" && "$python" "$here/suite.py" --out "$out/gpu_suite.json" "${@:2}"
