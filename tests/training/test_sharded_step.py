"""What the compiled step of a mesh holds and sends."""

from __future__ import annotations

import re

import jax
import numpy as np

from jaxtune.config.training_sections import TrainConfig
from jaxtune.models import DecoderConfig, random_model
from jaxtune.training import Trainer
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.low_rank import LowRankRule


def test_no_device_holds_the_hidden_states_of_all_rows(mesh: jax.sharding.Mesh) -> None:
    config = DecoderConfig("llama", 512, 64, 128, 2, 4, 4, 16)
    trainer = Trainer(
        random_model(config, jax.random.key(0), mesh),
        UpdatePlan([LowRankRule(match="layers.*.attention.{q,v}", rank=4)]),
        TrainConfig(steps=4, batch_size=8, sequence_length=17),
    )
    names = ("tokens", "targets", "positions", "segment_ids", "example_ids")
    batch = {name: np.zeros((8, 17), np.int32) for name in names} | {"weights": np.ones((8, 17), np.float32)}
    text = trainer.compile_step(batch).as_text()
    # The last two sizes tell hidden states, whole or cut by width over fsdp. A device has a quarter of the rows; only
    # what is looked up in the table, whose rows' width fsdp cuts, is there for the half that data leaves.
    rows = {int(rows) for rows in re.findall(r"f32\[(\d+),17,(?:64|32)\]", text)}
    assert 2 in rows
    assert max(rows) <= 4
