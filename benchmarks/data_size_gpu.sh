#!/usr/bin/env bash
# How much data is enough, up to the 6,500 examples at which the paper sees gains end: on one GPU, as two CPU cores would
# need a day. Nothing of this was measured on a GPU: 20 minutes a task is an estimate from the FLOPs of its 8,400 steps
# (4 minutes at a tenth of an H100's peak) and 16 tests of 1,000 questions.
#
#   benchmarks/data_size_gpu.sh models/smollm2-135m-instruct attr_oamine optimizer.learning_rate=1e-3
#
# The first argument is the model, the second the task; the others override the configuration, such as the winner of a
# search. Stopped or killed, the same command goes on.
set -euo pipefail
model=$1 task=$2
shift 2
exec jaxtune study data-size "configs/studies/smollm2/$task.yaml" "model.path=$model" "run_dir=runs/data-size-gpu-$task" \
  "study.output=docs/experiments/smollm2/data-size-gpu-$task" train.steps=null train.epochs=2 \
  "data.test={examples: 1000, absent: false}" evaluation.batch_size=256 \
  "study.data_size={unit: examples, sizes: [0, 200, 650, 1300, 2600, 6500], seeds: [21, 22, 23], sampling: stratified, \
score: exact_match, saturation: gap}" "$@"
