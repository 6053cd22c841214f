"""A search over methods that share a program: one compiled step, a journal that replays, adapters of each method."""

from __future__ import annotations

import json

import pytest
from synthetic import records

from jaxtune.config import load_config
from jaxtune.errors import UserError
from jaxtune.search.checks import checked_runner
from jaxtune.search.run import make_study, search
from jaxtune.search.trained import any_trial
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.updates import save_adapter
from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]

METHODS = ["low_rank", "lora_plus", "dora"]
SPACE = {
    "optimizer.learning_rate": {"log_uniform": [1e-3, 1e-1]},
    "update.0.method": {"choice": METHODS},
    "update.0.rank": {"power_of_two": [2, 4]},
    "update.0.ratio": {"choice": [2.0, 8.0]},
}


def configured(config_file, run_dir, space=None, **more):
    section = {
        "trials": 6,
        "promote": 1,
        "initial": 6,
        "population": 2,
        "finish": [1.0],
        "space": space or SPACE,
        **more,
    }
    return load_config(
        config_file, [f"run_dir={run_dir}", "train.steps=4", "data.test=null", f"search={json.dumps(section)}"]
    )


@pytest.mark.slow
def test_a_search_over_methods_is_one_program(config_file, tmp_path):
    config = configured(config_file, tmp_path / "whole")
    runner = checked_runner(config)
    assert runner.slots_of(runner.trainer(config)) == 2
    make_study(config, runner).run()
    runner.close()
    assert runner.compilations == 1
    whole = records(tmp_path / "whole")
    proposed = {line["trial"]: line["configuration"] for line in whole if line["event"] == "proposed"}
    assert {configuration["update.0.method"] for configuration in proposed.values()} == set(METHODS)
    # Stopped on the way and gone on with, it is the same study.
    config = configured(config_file, tmp_path / "parts")
    asked = iter(range(100))
    assert search(config, should_stop=lambda: next(asked) > 2) is None
    summary = search(config)
    assert summary is not None
    scores = [
        [(line["trial"], line["score"]) for line in records(tmp_path / name) if line["event"] == "scored"]
        for name in ("whole", "parts")
    ]
    assert sorted(scores[0]) == sorted(scores[1])
    # A trial leaves what its own method leaves.
    opened = OpenedConfig(config)
    number = next(number for number, one in proposed.items() if one["update.0.method"] == "dora")
    state = any_trial(tmp_path / "parts", number)
    trainer, values, trained = TrainerRunner(opened).load(state.trial)
    save_adapter(
        tmp_path / "dora", trainer.plan, trained.trainable, values, opened.model.config, "base", fixed=trained.fixed
    )
    written = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    assert (written["r"], written["use_dora"]) == (proposed[number]["update.0.rank"], True)
    assert (tmp_path / "parts" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("choices", "rule", "message"),
    [
        (
            ["low_rank", "norms"],
            {},
            r"search\.space\.update\.0\.method: 'norms' has no key 'rank', which update\.0 sets to 4",
        ),
        (
            ["low_rank", "dora"],
            {"match": "lm_head"},
            r"'dora': update\.0: method dora does not serve lm_head.*low_rank",
        ),
        (["low_rank", "pissa"], {"rank": [16, 64]}, r"'pissa': update\.0\.rank: 64 is above the smaller side"),
    ],
)
def test_what_a_method_cannot_take_is_told_before_training(config_file, tmp_path, choices, rule, message):
    space = {"update.0.method": {"choice": choices}}
    if "rank" in rule:
        space["update.0.rank"] = {"power_of_two": rule["rank"]}
    config = configured(config_file, tmp_path / "run", space)
    if "match" in rule:
        config = load_config(config_file, [f"update.0.match={rule['match']}", f"search={json.dumps({'space': space})}"])
    with pytest.raises(UserError, match=message):
        search(config)
    assert not (tmp_path / "run" / "trials.jsonl").exists()
