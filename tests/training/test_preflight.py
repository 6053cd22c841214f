"""A dry run tells what the run would do, and writes nothing."""

from __future__ import annotations

import json

import pytest

from jaxtune.config import load_config, with_overrides
from jaxtune.errors import UserError
from jaxtune.training.preflight import preflight
from jaxtune.training.run_directory import RunDirectory

# Of the tiny model: q, k, v, o, gate, up, down of a layer, and the head.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
ELEMENTS = 2 * (LAYER + 2 * 32) + 2 * 48 * 32 + 32


@pytest.fixture
def config(config_file):
    return load_config(config_file)


def test_counts(config, tmp_path, rows):
    before = sorted(tmp_path.rglob("*"))
    found = preflight(config)
    assert sorted(tmp_path.rglob("*")) == before
    assert found.trained_parameters == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert found.examples == {"train": 64, "validation": 12, "test": 12}
    assert (found.name, found.steps) == ("tiny", 20)
    # Products of a frozen base: 2 forward, 2 for the gradients of activations; of what is trained 2 more; attention
    # over half of the square, its backward pass twice its forward.
    tokens, low_rank = 8 * 8, found.trained_parameters
    products = 4 * (2 * LAYER + 48 * 32) + 6 * low_rank
    attention = 3 * 2 * (2 * 2 * 4 * 8 * 8 / 2)
    assert found.flops_per_step == pytest.approx(tokens * (products + attention))
    text = found.as_dict()
    assert text["checked"] is True
    assert json.loads(json.dumps(text)) == text


def test_memory_is_that_of_the_compiled_step(config):
    memory = preflight(config).memory
    trained = 2 * (4 * (32 + 32) + 4 * (32 + 16))
    # On each device: the float32 base (the data axis copies it), parameters and two moments, and a row of the batch.
    least = 4 * ELEMENTS + 3 * 4 * trained
    assert least < memory["arguments"] < least + 2000
    assert memory["temporaries"] > 0
    # The state is donated: what comes out anew are the metrics.
    assert memory["outputs"] < 2000
    assert memory["total"] == memory["arguments"] + memory["temporaries"] + memory["outputs"] < memory["free"]


def test_a_directory_with_another_run_is_told(config):
    RunDirectory(config.directory).claim(with_overrides(config, {"train.seed": 5}))
    with pytest.raises(UserError, match=r"train\.seed: there 5, now 0"):
        preflight(config, directory=RunDirectory(config.directory))
