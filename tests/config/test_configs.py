"""The configurations that users copy."""

from pathlib import Path

import pytest

from jaxtune.config import load_config, with_overrides
from jaxtune.search.checks import check_space
from jaxtune.search.lora_space import with_space

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_valid_and_says_when_to_use_it(path):
    config = load_config(path)
    # An experiment's results are named after its task.
    tasks = ("attr_oamine", "slots_restaurant8k")
    assert config.name in (tasks if "studies" in path.parts else (path.stem,))
    assert path.read_text(encoding="utf-8").startswith("# ")
    if config.search is not None:
        # Which model it is changes the ranges alone.
        check_space(with_space(with_overrides(config, {"model.path": "jaxtune:nano"})))
