#!/usr/bin/env bash
# What `make demo` runs once everything is built: the kernels against reference files, a small language model trained on
# Shakespeare for a few minutes, its loss as a curve, and text that it writes.
#
#   scripts/demo.sh [FOLDER]     the checkpoint, metrics and curve go to FOLDER (runs/demo)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-runs/demo}
latte=build/latte

say() { printf '\n== %s\n' "$*"; }

say "The kernels of this machine against reference tensors of the paper's code"
"$latte" verify tests/golden/*.safetensors

say "Training on Shakespeare (a few minutes; Ctrl-C saves, and the same command with --resume goes on)"
"$latte" train --text data/tinyshakespeare.txt --out "$folder" --attention macchiato

say "The curve"
ls -l "$folder"

say "What the model writes"
"$latte" generate --checkpoint "$folder" --prompt 'ROMEO:' --tokens 500 --temperature 0.8 --seed 1 --stats
