#!/usr/bin/env bash
# A new user's path, with the jaxtune that PATH finds, in the working directory, which is empty: a configuration of the
# package, its dry run, a search of three trials, the winner trained, exported and loaded.
set -euo pipefail
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

quietly() {
  "$@" >output.txt 2>&1 || { echo "failed: $*" >&2; cat output.txt >&2; exit 1; }
}

small=(train.steps=5 train.batch_size=2 train.sequence_length=64 data.too_long=drop "data.train.split=train[:20]"
  "data.validation.split=validation[:2]" "data.test.split=test[:2]" evaluation.batch_size=4 evaluation.max_new_tokens=4
  telemetry.tensorboard=false search.trials=3 search.initial=2 search.promote=1)

quietly jaxtune init quickstart
quietly jaxtune search quickstart.yaml "${small[@]}" --dry-run
test ! -e runs
quietly jaxtune search quickstart.yaml "${small[@]}"
test -s runs/quickstart/report.html
winner=$(python -c 'import json; print(json.load(open("runs/quickstart/summary.json"))["best"]["command"])')
quietly bash -c "$winner run_dir=runs/winner"
quietly jaxtune export runs/winner/config.yaml --merged model
quietly jaxtune export runs/winner/config.yaml --peft adapter
python "$(dirname "$0")/load.py"
