"""Methods in one program: each is what it is alone, whatever the others need."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import load_file

from jaxtune.config.hyperparameters import hyperparameters
from jaxtune.config.training_sections import TrainConfig
from jaxtune.config.update_rules import Rule
from jaxtune.errors import UserError
from jaxtune.models import DecoderConfig, random_model
from jaxtune.models.linear import FrozenLayer
from jaxtune.training import Trainer
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.training.population import Population
from jaxtune.updates import UpdatePlan, save_adapter, treatments
from jaxtune.updates.shared import partners, shared_rule
from tests.compiled_loops import collectives_in_loops

CONFIG = DecoderConfig(
    "qwen2", 48, 16, 24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, qkv_bias=True, initializer_range=0.3
)  # fmt: skip
EIGHT = ("low_rank", "rslora", "lora_plus", "lora_fa", "dora", "pissa", "olora", "orthogonal")
RANKS = (4, 3, 2, 4, 1, 3, 4, 3)
MATCH, PATH, CAPACITY = "layers.*.attention.q", "layers.attention.q", {"update.0.rank": 4}


def rule(method: str, match: str = MATCH, **numbers: Any) -> Any:
    return TypeAdapter(Rule).validate_python({"match": match, "method": method, "alpha": 6.0, **numbers})


RULES = [
    rule(method, rank=rank, dropout=0.2 * (at % 2)) for at, (method, rank) in enumerate(zip(EIGHT, RANKS, strict=True))
]


def values_of(one: Any, methods: tuple[str, ...] = EIGHT) -> dict[str, float]:
    return hyperparameters([shared_rule(one, methods)], "update.")


def part_of(one: Any) -> Any:
    plan = UpdatePlan([one]).resolve(CONFIG, CAPACITY)
    return next(part for part in plan.parts if part.path == PATH)


def test_who_shares_follows_from_what_a_method_declares():
    own = list(treatments.own())
    assert set(EIGHT) == set(partners("dora", own))
    assert partners("ia3", own) == ("ia3",)
    assert partners("dora", ["full", "pissa", "dora", "vera"]) == ("pissa", "dora")
    assert partners("full", ["pissa", "dora"]) == ("full",)


@pytest.mark.parametrize(
    ("methods", "arrays", "fixed"),
    [
        (("low_rank", "rslora", "lora_plus"), {"a", "b"}, set()),
        (("low_rank", "orthogonal", "lora_fa"), {"a", "b"}, set()),
        (("low_rank", "dora"), {"a", "b", "m"}, {"norm"}),
        (("low_rank", "olora"), {"a", "b"}, {"a0", "b0"}),
    ],
)
def test_a_program_holds_what_its_methods_need(methods, arrays, fixed):
    part = part_of(shared_rule(RULES[0], methods))
    assert set(part.arrays()) == arrays
    assert set(part.fixed()) == fixed
    # A product with a second pair of factors is made where there can be one, and a factor where there can be one.
    held = {name: jnp.zeros(shape.shape) for name, shape in {**part.arrays(), **part.fixed()}.items()}
    base = {f"{PATH}.kernel": jnp.ones((2, 16, 16))}
    adapter = part.apply(base, {name: held[name] for name in arrays}, {name: held[name] for name in fixed}, {}, None)
    leaves = {leaf.shape for leaf in jax.tree.leaves(adapter.adapters[PATH])}
    assert ((2, 16, 8) in leaves) == ("olora" in methods)
    assert ((2, 16) in leaves) == ("dora" in methods)


def test_term_and_gradients_are_those_of_the_method_alone():
    """Of arrays away from the start, in one program for all eight, at ranks of their own."""
    generator = np.random.default_rng(0)
    base = {f"{PATH}.kernel": jnp.asarray(generator.standard_normal((2, 16, 16)), jnp.float32)}
    x, bias = (jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in ((5, 16), (16,)))
    noise = {"a": (2, 16, 4), "b": (2, 4, 16), "m": (2, 16)}
    noise = {name: jnp.asarray(0.1 * generator.standard_normal(shape), jnp.float32) for name, shape in noise.items()}
    key = jax.random.key(0)

    def loss(part: Any, arrays: Any, fixed: Any, values: Any) -> Any:
        adapter = part.apply(base, arrays, fixed, values, None).adapters[PATH]
        one = jax.tree.map(lambda leaf: leaf[1], adapter)
        return jnp.sum(jnp.sin(one.product(FrozenLayer(x, base[f"{PATH}.kernel"][1], bias))))

    def looked(part: Any, values: Any, moved: Any) -> Any:
        arrays, fixed = part.init(key, base, values)
        at = {name: array + moved.get(name, 0.0) for name, array in arrays.items()}
        value, gradients = jax.value_and_grad(lambda arrays: loss(part, arrays, fixed, values))(at)
        return {**arrays, **fixed}, value, gradients

    shared, parts = part_of(shared_rule(RULES[0], EIGHT)), [part_of(one) for one in RULES]
    each = [values_of(one) for one in RULES]
    # Away from the start lies what the method trains.
    moved = [{name: array * (name in part.arrays()) for name, array in noise.items()} for part in parts]
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *zip(each, moved, strict=True)
    )
    together = jax.jit(lambda given: jax.lax.map(lambda one: looked(shared, *one), given))(stacked)
    alone = jax.jit(
        lambda: [looked(part, hyperparameters([one], "update."), noise) for part, one in zip(parts, RULES, strict=True)]
    )()
    for slot, (one, (expected, value, gradients)) in enumerate(zip(RULES, alone, strict=True)):
        held, found, slopes = jax.tree.map(lambda leaf, slot=slot: leaf[slot], together)
        for name, array in expected.items():
            np.testing.assert_allclose(held.pop(name), array, rtol=1e-5, atol=1e-6, err_msg=f"{one.method} {name}")
        assert not any(np.any(rest) for rest in held.values()), "what a method has not is zero"
        assert float(found) == pytest.approx(float(value), rel=1e-5), one.method
        for name, slope in slopes.items():
            own = gradients.get(name, np.zeros(slope.shape))
            np.testing.assert_allclose(slope, own, rtol=2e-4, atol=1e-4, err_msg=f"{one.method} {name}")
            assert name in gradients or not np.any(slope), "it has no part in the norm"


@pytest.mark.slow
def test_eight_methods_train_in_one_population_as_alone(tmp_path):
    """Mixed ranks, gradients clipped, weights decayed, some with dropout: one trace, and each slot is its run alone."""
    model = random_model(CONFIG, jax.random.key(0))
    settings = TrainConfig(steps=4, batch_size=4, sequence_length=6)
    optimizer = OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup=0.0, clip_norm=0.1, weight_decay=0.1)

    def trainer(one: Any) -> Trainer:
        return Trainer(model, UpdatePlan([one]), settings, optimizer, capacity=CAPACITY, dropout=True)

    def batch(seed: int) -> dict[str, np.ndarray]:
        tokens = np.random.default_rng(seed).integers(0, 48, (4, 7)).astype(np.int32)
        ids = np.arange(4, dtype=np.int32)[:, None] * np.ones((1, 6), np.int32)
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": np.ones((4, 6), np.float32),
            "example_ids": ids,
        }

    together = trainer(shared_rule(RULES[0], EIGHT))
    population = Population(together, len(EIGHT), batched=True)
    each = [values_of(one) for one in RULES]
    for slot, values in enumerate(each):
        population.put(slot, together.init(values, seed=slot), values)
    metrics = [population.step(dict.fromkeys(range(len(EIGHT)), batch(step))) for step in range(3)]
    assert population.traces == 1
    for slot, one in enumerate(RULES):
        alone, taken = trainer(one), population.take(slot)
        start = state = alone.init(seed=slot)
        begun = jax.tree.map(np.asarray, (start.trainable, start.fixed))
        for step in range(3):
            state, told = alone.step(state, batch(step))
            for name in ("loss", "grad_norm"):
                assert metrics[step][slot][name] == pytest.approx(float(told[name]), rel=1e-4), (one.method, step, name)
        held = {**taken.trainable["low_rank"][PATH], **taken.fixed["low_rank"][PATH]}
        own = {**state.trainable[one.method][PATH], **state.fixed.get(one.method, {}).get(PATH, {})}
        for name, array in own.items():
            np.testing.assert_allclose(held.pop(name), array, rtol=1e-3, atol=1e-4, err_msg=f"{one.method} {name}")
        assert not any(np.any(rest) for rest in held.values()), f"{one.method} moved what it has not"
        if one.method == "lora_fa":
            np.testing.assert_array_equal(taken.trainable["low_rank"][PATH]["a"], begun[1]["lora_fa"][PATH]["a"])
        assert together.plan.trainable_parameters(each[slot]) == alone.plan.trainable_parameters()
        assert together.step_flops(each[slot]).total == alone.step_flops().total
        assert together.plan.table(each[slot]) == alone.plan.table()
        # It leaves the adapter that the method alone leaves, under its own name.
        for name, plan, trained, values in (
            ("together", together.plan, taken, each[slot]),
            ("alone", alone.plan, state, alone.hyperparameters),
        ):
            save_adapter(
                tmp_path / one.method / name, plan, trained.trainable, values, CONFIG, "base", fixed=trained.fixed
            )
        mine, theirs = (tmp_path / one.method / name for name in ("together", "alone"))
        assert json.loads((mine / "adapter_config.json").read_text()) == json.loads(
            (theirs / "adapter_config.json").read_text()
        )
        tensors, expected = (load_file(folder / "adapter_model.safetensors") for folder in (mine, theirs))
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(tensors[name], tensor, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_mesh_computes_what_one_device_does(mesh):
    methods = ("lora_fa", "dora", "pissa")
    rules = [rule(method, rank=2) for method in methods]
    tokens = np.random.default_rng(0).integers(0, 48, (8, 7)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, 6), np.float32)}
    one, many = (
        Trainer(
            random_model(CONFIG, jax.random.key(0), mesh=where),
            UpdatePlan([shared_rule(rules[0], methods)]),
            TrainConfig(steps=4, batch_size=8, sequence_length=6),
            OptimizerConfig(learning_rate=3e-3),
        )
        for where in (None, mesh)
    )
    arguments = (many.params, jax.random.key(0), many.traced_values(), None, None)
    assert not collectives_in_loops(many._init.lower(*arguments).compile().as_text() or "")
    for each in (values_of(one, methods) for one in rules):
        mine, theirs = (trainer.step(trainer.init(each), batch, each)[1] for trainer in (one, many))
        for name in ("loss", "grad_norm"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-4), name


def test_what_one_of_the_methods_cannot_do_is_told_of_it():
    with pytest.raises(UserError, match=r"update\.0: method dora does not serve lm_head"):
        UpdatePlan([shared_rule(rule("low_rank", "lm_head"), ("low_rank", "dora"))]).resolve(CONFIG)
    two = [
        shared_rule(rule("low_rank", "layers.0.attention.q"), EIGHT),
        shared_rule(rule("dora", "**.q"), ("dora", "pissa")),
    ]
    with pytest.raises(
        UserError, match=r"update\.1: its layers of layers\.attention\.q\.kernel are of the methods dora"
    ):
        UpdatePlan(two).resolve(CONFIG)
    # A rank that only the start of one method forbids is a matter of that method.
    plan = UpdatePlan([shared_rule(rule("low_rank", rank=17), ("low_rank", "pissa"))]).resolve(CONFIG)
    plan.check(values_of(rule("low_rank", rank=17), ("low_rank", "pissa")))
    with pytest.raises(UserError, match=r"update\.0\.rank: 17 is above the smaller side"):
        plan.check(values_of(rule("pissa", rank=17), ("low_rank", "pissa")))


def test_rules_of_different_methods_on_one_stack():
    """Each layer is as its own rule says."""
    rules = [
        shared_rule(rule("dora", "layers.0.attention.q", rank=2), EIGHT),
        shared_rule(rule("pissa", "**.q", rank=3), EIGHT),
    ]
    plan = UpdatePlan(rules).resolve(CONFIG)
    (part,) = plan.parts
    base = {f"{PATH}.kernel": jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 16)), jnp.float32)}
    arrays, fixed = part.init(jax.random.key(0), base, {})
    assert np.any(arrays["m"][0])
    assert not np.any(arrays["m"][1])
    assert not np.any(fixed["a0"][0])
    assert np.any(fixed["a0"][1])
    assert [row["method"] for row in plan.table()[:2]] == ["dora 2", "pissa 3"]
    term: Any = part.apply(base, arrays, fixed, {}, None).adapters[PATH]
    np.testing.assert_array_equal(term.arrays["factor"][1], 1.0)


OUTSIDE = '''
from typing import Annotated, Literal

import jax.numpy as jnp
from pydantic import Field

from jaxtune.config.section import Traced
from jaxtune.updates.treatments.low_rank import LowRank, RankRule


class StrongerRule(RankRule):
    """A term that is made stronger."""

    method: Literal["stronger"] = Field(default="stronger", description="Stronger.")
    strength: Annotated[float, Traced()] = Field(default=3.0, description="By so much.")


class Stronger(LowRank):
    """LoRA times a number."""

    Section = StrongerRule

    def changed(self, term, held, base, values, on=None):
        strength = self.of_layers(self.gathered("strength", values))
        factor = strength if on is None else jnp.where(on, strength, 1.0)
        return type(term)(term.a, term.b, term.scale * factor, term.dropout_rate, term.dropout_seed)


class Counted(Stronger):
    """With a key that is no number of the step, it has a program of its own."""

    class Section(StrongerRule):
        """A rule."""

        method: Literal["counted"] = Field(default="counted", description="Counted.")
        count: int = Field(default=1, description="Parts.")
'''


def test_a_method_from_outside_joins_by_its_file_alone(tmp_path, monkeypatch):
    (tmp_path / "outside_stronger.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    name = "outside_stronger:Stronger"
    assert partners(name, ["dora", name, "outside_stronger:Counted"]) == ("dora", name)
    methods = ("dora", name, "pissa")
    base = {f"{PATH}.kernel": jnp.ones((2, 16, 16))}
    for one, strength in ((rule(name, rank=2, strength=5.0), 5.0), (rule("dora", rank=2), 1.0)):
        part, values = part_of(shared_rule(rule("pissa"), methods)), values_of(one, methods)
        arrays, fixed = part.init(jax.random.key(0), base, values)
        adapter: Any = part.apply(base, arrays, fixed, values, None).adapters[PATH]
        np.testing.assert_allclose(adapter.arrays["term"].scale, 3.0 * strength, rtol=1e-6)
