"""Counted costs against the exported adapter and a closed form, and bounds on them before a study."""

from __future__ import annotations

import pytest
from safetensors.numpy import load_file

from jaxtune.config import hyperparameters, load_config, with_overrides
from jaxtune.errors import UserError
from jaxtune.search.run import preflight_search
from jaxtune.search.settings import search_config
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.training.opened_config import OpenedConfig
from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]

UPDATE = "update=[{match: 'layers.*.attention.{q,v}', method: low_rank, rank: 4}, {match: layers.1.mlp.up, method: low_rank, rank: 2}]"  # fmt: skip  # noqa: E501
SEARCH = "search={trials: 2, promote: 1, objectives: [loss, exact_match, adapter_bytes], space: {update.0.rank: {integer: [1, 6]}}}"  # fmt: skip  # noqa: E501
TASK = "evaluation={task: extraction, max_new_tokens: 2, stop: null}"


def test_costs_are_those_of_what_is_exported_and_counted_by_hand(config_file, tmp_path):
    overrides = [UPDATE, SEARCH, TASK, "train.steps=3", "data.test=null"]
    runner = TrainerRunner(OpenedConfig(load_config(config_file, overrides)))
    changed = {"update.0.rank": 3}
    costs, wider = runner.costs(changed), runner.costs({"update.0.rank": 6, "train.steps": 6})
    config = runner.configuration(changed)
    trainer, values = runner.trainer(config), hyperparameters(config)
    state = trainer.init(values)
    trainer.save_adapter(tmp_path / "adapter", state, base=config.model.path, hyperparameters=values)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert costs["adapter_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert costs["flops"] == pytest.approx(trainer.step_flops(values).total * 3)
    # Two layers of q and v, 32 to 32 and 32 to 16; a column more costs 2 (in + out) three times a token.
    tokens = config.train.batch_size * config.train.sequence_length
    assert wider["flops"] / 6 - costs["flops"] / 3 == pytest.approx(tokens * 3 * 2 * 3 * 2 * (64 + 48))


def test_what_cannot_be_counted_or_measured_is_refused_before_training(config_file):
    two = load_config(config_file, [UPDATE, SEARCH, "search.objectives=[loss, adapter_bytes]", "data.test=null"])
    tight = with_overrides(two, {"search.where": {"adapter_bytes": {"below": 10}}})
    with pytest.raises(UserError, match=r"search\.where\.adapter_bytes: .* below 10; .* adapter_bytes [\d,]+ \(update"):
        preflight_search(tight)
    without = load_config(config_file, [UPDATE, SEARCH, "evaluation={task: none}"])
    with pytest.raises(UserError, match=r"search\.objectives: 'exact_match' needs evaluation\.task"):
        search_config(without)
    for wrong, meant in (("exact_macth", "exact_match"), ("adapter_byte", "adapter_bytes")):
        with pytest.raises(UserError, match=meant):
            load_config(config_file, [UPDATE, SEARCH, f"search.objectives=[loss, {wrong}]"])
        with pytest.raises(UserError, match=meant):
            load_config(config_file, [UPDATE, SEARCH, f"search.where={{{wrong}: {{below: 8e6}}}}"])
