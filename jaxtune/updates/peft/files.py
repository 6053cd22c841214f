"""The files of a PEFT adapter, written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.files import replaced
from jaxtune.models.tensor_files import TensorToWrite, write_tensors
from jaxtune.updates.peft.format import CONFIG_FILE, TENSOR_FILE


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], readme: str) -> None:
    """Writes an adapter's directory; files of an earlier one are replaced, each at once.

    Args:
      directory: made if it does not exist.
      config: what ``adapter_config.json`` says.
      tensors: by their names in the file.
      readme: what it says of itself to people.
    """
    directory.mkdir(parents=True, exist_ok=True)
    to_write = [
        TensorToWrite(name, value.dtype, value.shape, lambda value=value: value) for name, value in tensors.items()
    ]
    write_tensors(directory / TENSOR_FILE, to_write, {"format": "pt"})
    for name, text in ((CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n"), ("README.md", readme)):
        with replaced(directory / name) as file:
            file.write(text.encode())
