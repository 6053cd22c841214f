"""Loads what was exported in the working directory, with the jaxtune of this interpreter's installation."""

import json
import sys
from importlib.resources import files
from pathlib import Path

import jaxtune_kernels
import numpy as np
from transformers import AutoTokenizer

import jaxtune

for package in (jaxtune, jaxtune_kernels):
    place = Path(package.__file__ or "").resolve()
    assert place.is_relative_to(Path(sys.prefix).resolve()), f"{place} is not of this installation"
    assert files(package).joinpath("py.typed").is_file()

model = jaxtune.load_model("model")
tokens = np.asarray(AutoTokenizer.from_pretrained("model")("brand:")["input_ids"], np.int32)[None]
logits = np.asarray(model(tokens, np.arange(tokens.size)[None], np.ones_like(tokens)))
assert logits.shape == (1, tokens.size, model.config.vocab_size)
assert np.isfinite(logits).all()
assert json.loads(Path("adapter/adapter_config.json").read_text())["peft_type"] == "LORA"
print(f"jaxtune {jaxtune.__version__} on Python {sys.version.split()[0]}: loaded and answered")
