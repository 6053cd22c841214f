"""A tiny task: rows on disk, a tokenizer, a random model, a configuration over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxtune.models import DecoderConfig, random_model, save_model

FLAGS = "--xla_backend_optimization_level=0"
WORDS = [f"w{index}" for index in range(40)]


def write_tokenizer(directory: Path) -> None:
    """A word-level tokenizer that transformers loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model directory: random llama of two layers with its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    config = DecoderConfig(
        family="llama",
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_ids=(2,),
        initializer_range=0.2,
    )
    save_model(random_model(config, jax.random.key(0)), directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """Three JSONL files; every example takes eight positions, so that two of them fill one packed row of 16.

    Of these two to four count for the loss: a mean of means over microbatches or devices is not the mean over all.
    """
    directory = tmp_path_factory.mktemp("rows")
    for split, count in (("train", 64), ("validation", 12), ("test", 12)):
        with (directory / f"{split}.jsonl").open("w") as file:
            for index in range(count):
                words = [WORDS[(index * 7 + place * 3) % len(WORDS)] for place in range(6)]
                asked = 4 + index % 3
                answer = [words[1], words[3], words[2]][: 7 - asked]
                file.write(json.dumps({"question": " ".join(words[:asked]), "answer": " ".join(answer)}) + "\n")
    return directory


def configuration(run_dir: Path, model: Path, rows: Path) -> str:
    """A configuration over the tiny model and rows, as YAML."""
    return f"""\
name: tiny
run_dir: {run_dir}
model: {{path: {model}}}
data:
  train: {rows / "train.jsonl"}
  validation: {rows / "validation.jsonl"}
  test: {rows / "test.jsonl"}
  prompt: "{{question}} :"
  completion: " {{answer}}"
  packing: false
train: {{steps: 20, batch_size: 8, sequence_length: 8, log_every: 1}}
optimizer: {{learning_rate: 1e-4, warmup: 0.1}}
update:
  - {{match: "layers.*.attention.{{q,v}}", method: low_rank, rank: 4, alpha: 8, dropout: 0.0}}
telemetry: {{tensorboard: false}}
"""


@pytest.fixture
def config_file(tmp_path, tiny_model, rows) -> Path:
    """A configuration over the tiny model and rows; run_dir lies beside it."""
    path = tmp_path / "run.yaml"
    path.write_text(configuration(tmp_path / "run", tiny_model, rows))
    return path


def command(*arguments: object, devices: int = 1, processes: tuple[int, int, int] | None = None) -> subprocess.Popen:
    """Starts ``jaxtune`` as a user would, on so many CPU devices.

    Args:
      arguments: of the command.
      devices: virtual CPU devices of the process.
      processes: (index, count, port) of a run of several processes.
    """
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FLAGS}"}
    if processes is not None:
        index, count, port = processes
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
    return subprocess.Popen(
        [sys.executable, "-m", "jaxtune", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for a command and returns its standard output; fails with its error output if it ends otherwise."""
    output, errors = process.communicate(timeout=600)
    assert process.returncode == code, f"exit code {process.returncode}:\n{errors[-3000:]}"
    return output
