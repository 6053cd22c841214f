"""What depends on each key is said at the key, and lists of keys follow from that."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.config import Config, program_name
from jaxtune.config.reference import sections
from jaxtune.config.roles import mark_of, marked, within, without
from jaxtune.config.search_section import SearchConfig
from jaxtune.config.section import (
    Amendable,
    BesideAdapter,
    Compiled,
    Free,
    HostOnly,
    LoopOnly,
    PerTrial,
    Recorded,
    Relocatable,
    Shared,
    Traced,
)
from jaxtune.errors import UserError
from jaxtune.search.checks import check_space
from jaxtune.updates.treatments.low_rank import LowRankRule

DECIDES = (Compiled, Traced, LoopOnly, Shared, HostOnly)


def test_every_key_says_what_depends_on_it():
    for key, section in sections():
        for name, field in section.model_fields.items():
            roles = [role.__name__ for role in DECIDES if mark_of(field, role)]
            # Below the top a key without a mark has its section's.
            assert len(roles) <= 1, f"{key}.{name}: {roles}"
            assert roles or key, f"{name}: mark it as one of {', '.join(role.__name__ for role in DECIDES)}"


def test_every_key_of_a_search_says_whether_a_study_may_change_it():
    """One that decides the trials and is not recorded would let two studies go on in one journal."""
    # A preset is in the space that it makes; metrics decide no trial, and config.yaml holds them.
    in_a_form_of_their_own = {
        "space",
        "preset",
        "objective",
        "where",
        "population",
        "reference",
        "start_from",
        "metrics",
    }
    recorded, free = marked(Recorded, SearchConfig), marked(Free, SearchConfig)
    assert recorded.keys() | free.keys() | in_a_form_of_their_own == SearchConfig.model_fields.keys()
    assert not recorded.keys() & free.keys()
    assert marked(Amendable, SearchConfig).keys() <= recorded.keys()


@pytest.mark.parametrize(
    ("role", "keys"),
    [
        (Compiled, "model data train optimizer update parallel"),
        (HostOnly, "name run_dir paths_from search study telemetry train.checkpoint_minutes train.keep"),
        (Relocatable, "run_dir paths_from"),
        (
            Free,
            "study train.checkpoint_minutes train.keep search.workers search.ray_address search.worker_resources",
        ),
        (PerTrial, "train optimizer update data.packing"),
        (Amendable, "search.trials search.budget search.terminate search.promote search.fixed"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_what_journals_and_run_directories_on_disk_rely_on(role, keys):
    assert list(marked(role)) == keys.split()


def test_rules_tell_what_an_adapter_leaves_open():
    assert set(marked(BesideAdapter, LowRankRule)) == {
        "dropout",
        "layer_decay",
        "learning_rate_scale",
        "weight_decay",
    }


def config_of(**sections: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "a.jsonl", "validation": "b.jsonl", "completion": "{a}"},
            "train": {"steps": 8},
            **sections,
        }
    )


def test_a_journal_tells_programs_by_the_same_names_as_ever():
    assert program_name(config_of()) == "ba625f396215"


@pytest.mark.parametrize("key", ["kernels", "name", "data.loss_on", "telemetry.tensorboard"])
def test_what_trials_share_is_not_searched(key):
    with pytest.raises(UserError, match=rf"search.space: '{key}' is the same for all trials.*train, optimizer, update"):
        check_space(config_of(search={"space": {key: {"choice": ["auto", "xla"]}}}))


NAMES = st.sampled_from(["a", "b", "c"])
NESTED = st.recursive(st.integers(), lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=8)


def leaves(nested: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(nested, dict):
        return {prefix: nested}
    return {k: v for name, inner in nested.items() for k, v in leaves(inner, f"{prefix}.{name}".lstrip(".")).items()}


@given(st.dictionaries(NAMES, NESTED, max_size=3), st.lists(st.lists(NAMES, min_size=1, max_size=3).map(".".join)))
def test_a_configuration_without_some_keys_has_all_others(nested, keys):
    expected = {key: value for key, value in leaves(nested).items() if not within(key, keys)}
    assert leaves(without(nested, keys)) == expected
