from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config.hyperparameters import hyperparameters
from jaxtune.errors import UserError
from jaxtune.models.declarations import count_parameters, declare
from jaxtune.parallel.sharding import named_sharding
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.frozen import FrozenRule
from jaxtune.updates.treatments.full import Full, FullRule, place_layers
from jaxtune.updates.treatments.low_rank import LowRank, LowRankRule

KEY = jax.random.key(0)


def random_params(config, dtype=jnp.float32):
    generator = np.random.default_rng(0)
    return {
        path: jnp.asarray(generator.standard_normal(spec.shape), jnp.float32).astype(dtype)
        for path, spec in declare(config).items()
    }


def low_rank(match, **values):
    return LowRankRule(match=match, **values)


def values_of(rules, **changes):
    numbers = {**hyperparameters(list(rules), "update."), "optimizer.weight_decay": 0.01}
    numbers.update({name.replace("__", "."): value for name, value in changes.items()})
    return {name: jnp.float32(value) for name, value in numbers.items()}


def test_first_match_wins_and_the_rest_is_frozen(config):
    rules = [
        FrozenRule(match="layers.3"),
        low_rank("layers.{0,1}.attention.q", rank=4),
        low_rank("layers.*.attention.{q,v}", rank=2),
        FullRule(match="**.mlp_norm"),
        FullRule(match="final_norm"),
    ]
    plan = UpdatePlan(rules).resolve(config)
    assert {module.path: module.rules for module in plan.parts if isinstance(module, LowRank)} == {
        "layers.attention.q": (1, 1, 2, -1),
        "layers.attention.v": (2, 2, 2, -1),
    }
    full = [part for part in plan.parts if isinstance(part, Full)]
    assert {each.path: (each.layers, tuple(i for i in each.rules if i >= 0)) for each in full} == {
        "layers.mlp_norm.scale": ((0, 1, 2), (3, 3, 3)),
        "final_norm.scale": (None, (4,)),
    }
    trainable = jax.eval_shape(plan.init, KEY, random_params(config))
    assert jax.tree.map(lambda leaf: leaf.shape, trainable) == {
        "low_rank": {
            "layers.attention.q": {"a": (4, 32, 4), "b": (4, 4, 32)},
            "layers.attention.v": {"a": (4, 32, 2), "b": (4, 2, 16)},
        },
        "full": {"layers.mlp_norm.scale": (3, 32), "final_norm.scale": (32,)},
    }
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable)} == {"float32"}


def test_a_plan_changes_nothing_before_training(config):
    plan = UpdatePlan([low_rank("layers.*.mlp"), low_rank("lm_head", rank=3), FullRule(match="**.bias")]).resolve(
        config
    )
    params = random_params(config, jnp.bfloat16)
    merged, adapters = plan.apply(params, plan.init(KEY, params), {})
    for path, value in params.items():
        assert merged[path].dtype == value.dtype
        np.testing.assert_array_equal(merged[path], value)
    assert set(adapters) == {"layers.mlp.gate", "layers.mlp.up", "layers.mlp.down", "lm_head"}
    assert not any(np.any(adapter.b) for adapter in adapters.values())
    assert all(adapter.dropout_rate is None for adapter in adapters.values())
    assert adapters["lm_head"].a.shape == (32, 3)
    assert adapters["lm_head"].scale.shape == ()


def test_start_of_a_depends_on_key_path_layer_and_column_only(config):
    rules = [low_rank("layers.*.attention.{q,o}", rank=16)]
    plan = UpdatePlan(rules)
    params = random_params(config)
    small = jax.jit(plan.resolve(config).init)(KEY, params)["low_rank"]
    large = jax.jit(plan.resolve(config, {"update.0.rank": 64}).init)(KEY, params)["low_rank"]
    assert large["layers.attention.q"]["a"].shape == (4, 32, 64)
    for path in small:
        np.testing.assert_array_equal(small[path]["a"], large[path]["a"][..., :16])
    # Fewer modules, another rule order: the same start.
    alone = UpdatePlan([FrozenRule(match="**.o"), low_rank("layers.0.attention.q", rank=8)]).resolve(config)
    q = jax.jit(alone.init)(KEY, params)["low_rank"]["layers.attention.q"]["a"]
    np.testing.assert_array_equal(q, small["layers.attention.q"]["a"][..., :8])
    # PEFT's kaiming_uniform_(a=sqrt(5)) on (r, in) is uniform in ±1/sqrt(in).
    draws = np.asarray(large["layers.attention.q"]["a"]).reshape(-1)
    bound = 32**-0.5
    assert np.abs(draws).max() <= bound
    assert abs(draws.std() / (bound / 3**0.5) - 1) < 0.02
    assert len(np.unique(draws)) > 0.99 * draws.size  # no column, layer or module repeats another
    other = jax.jit(plan.resolve(config).init)(jax.random.key(1), params)["low_rank"]
    assert not np.any(other["layers.attention.q"]["a"] == small["layers.attention.q"]["a"])
    assert not np.any(small["layers.attention.o"]["a"][:, :, 0] == small["layers.attention.q"]["a"][:, :, 0])


def test_rank_alpha_and_dropout_are_gathered_for_each_layer(config, random_trainable):
    rules = [
        low_rank("layers.{0,2}.attention.q", rank=4, alpha=8.0, dropout=0.2),
        low_rank("layers.1.attention.q", rank=9, alpha=6.0, use_rslora=True),
    ]
    plan = UpdatePlan(rules).resolve(config, {"update.0.rank": 12})
    params = random_params(config)
    trainable = random_trainable(jax.eval_shape(plan.init, KEY, params))
    values = values_of(rules)
    apply = jax.jit(plan.apply)
    _, adapters = apply(params, trainable, values, jnp.uint32(5))
    q = adapters["layers.attention.q"]
    assert q.a.shape == (4, 32, 12)
    assert [int(np.any(q.a[layer] != 0, axis=0).sum()) for layer in range(4)] == [4, 9, 4, 0]
    np.testing.assert_allclose(q.scale, [2.0, 2.0, 2.0, 0.0])
    np.testing.assert_allclose(q.dropout_rate, [0.2, 0.0, 0.2, 0.0])
    assert len(np.unique(q.dropout_seed)) == 4
    # Another rank is another number.
    _, adapters = apply(params, trainable, values | {"update.0.rank": jnp.float32(8)}, jnp.uint32(5))
    np.testing.assert_allclose(adapters["layers.attention.q"].scale, [1.0, 2.0, 1.0, 0.0])
    assert [int(np.any(adapters["layers.attention.q"].a[i] != 0, axis=0).sum()) for i in range(4)] == [8, 9, 8, 0]


def test_dropout_seeds_differ_between_modules_layers_and_steps(config):
    plan = UpdatePlan([low_rank("layers.*.attention"), low_rank("lm_head")]).resolve(config)
    params = random_params(config)
    apply = jax.jit(lambda step: plan.apply(params, plan.init(KEY, params), {}, step)[1])
    seeds = [np.ravel(each.dropout_seed) for step in (1, 2) for each in apply(jnp.uint32(step)).values()]
    together = np.concatenate(seeds)
    assert together.size == 2 * (4 * 4 + 1) == len(np.unique(together))


def test_full_on_some_layers_trains_a_stack_of_them(config):
    rules = [FullRule(match="layers.{1,3}.mlp.up.kernel")]
    plan = UpdatePlan(rules).resolve(config)
    params = random_params(config, jnp.bfloat16)
    path = "layers.mlp.up.kernel"
    trainable = plan.init(KEY, params)
    np.testing.assert_array_equal(trainable["full"][path], params[path][jnp.array([1, 3])].astype(jnp.float32))

    def total(trainable):
        merged, _ = plan.apply(params, trainable, {})
        return jnp.sum(merged[path].astype(jnp.float32) * jnp.arange(4.0)[:, None, None])

    gradient = jax.grad(total)(trainable)["full"][path]
    np.testing.assert_array_equal(gradient[:, 0, 0], [1.0, 3.0])
    merged, _ = plan.apply(params, {"low_rank": {}, "full": {path: trainable["full"][path] + 1}}, {})
    changed = np.any(np.asarray(merged[path] != params[path]), axis=(1, 2))
    assert changed.tolist() == [False, True, False, True]


def test_another_choice_of_layers_runs_the_same_program():
    traces = []

    @jax.jit
    def place(stack, chosen, indices):
        traces.append(1)
        return place_layers(stack, chosen, indices)

    stack, chosen = jnp.zeros((5, 3), jnp.bfloat16), jnp.ones((2, 3))
    for layers in ([0, 1], [2, 4]):
        placed = place(stack, chosen, jnp.array(layers))
        assert placed.dtype == jnp.bfloat16
        assert np.flatnonzero(placed[:, 0]).tolist() == layers
    assert len(traces) == 1


def test_each_layer_of_an_array_belongs_to_its_rule(config):
    rules = [
        low_rank("layers.{0,1}.attention.q", learning_rate_scale=2.0, weight_decay=0.5),
        low_rank("layers.2.attention.q", learning_rate_scale=3.0),
        FullRule(match="layers.{1,3}.mlp.up.kernel", learning_rate_scale=0.1),
        FullRule(match="layers.2.mlp.up.kernel", weight_decay=0.25),
        FullRule(match="final_norm", weight_decay=0.0),
    ]
    plan = UpdatePlan(rules).resolve(config)
    layers = plan.rule_layers()
    trainable = jax.eval_shape(plan.init, KEY, random_params(config))
    jax.tree.map(lambda leaf, of_rule: None, trainable, layers)
    # Low-rank arrays have all layers; of what is trained itself only those that are, numbered anew.
    assert layers["low_rank"]["layers.attention.q"] == {part: {0: (0, 1), 1: (2,)} for part in "ab"}
    assert layers["full"]["layers.mlp.up.kernel"] == {2: (0, 2), 3: (1,)}
    assert layers["full"]["final_norm.scale"] == {4: None}


def test_numbers_of_a_rule_come_from_the_search_the_rule_or_the_optimizer(config):
    rules = [low_rank("layers.*.attention.q", learning_rate_scale=2.0), FullRule(match="final_norm", weight_decay=0.25)]
    plan = UpdatePlan(rules).resolve(config)
    values = values_of(rules, optimizer__weight_decay=0.01)
    groups = plan.groups()
    query, norm = groups["low_rank"]["layers.attention.q"]["a"], groups["full"]["final_norm.scale"]
    assert plan.rate_scale(query, 0, values) == pytest.approx(2.0)
    assert plan.weight_decay(query, 0, values) == pytest.approx(0.01)
    assert plan.weight_decay(norm, 1, values) == pytest.approx(0.25)
    # A decay that a search sets where the rule leaves it open.
    assert plan.weight_decay(query, 0, values_of(rules, update__0__weight_decay=0.7)) == pytest.approx(0.7)
    # A further factor of an array, and none of the decay.
    moved = dataclasses.replace(query, factors=("alpha",), decays=False)
    assert plan.rate_scale(moved, 0, values) == pytest.approx(2.0 * rules[0].alpha)
    assert plan.weight_decay(moved, 0, values) == 0.0


def test_axes_shard_the_trainable_arrays(config, mesh):
    plan = UpdatePlan([low_rank("layers.*.mlp.down"), low_rank("lm_head"), FullRule(match="embed")]).resolve(config)
    axes = plan.axes()
    assert axes["low_rank"]["layers.mlp.down"] == {"a": ("layers", "mlp", "rank"), "b": ("layers", "rank", "embed")}
    assert axes["low_rank"]["lm_head"] == {"a": ("embed", "rank"), "b": ("rank", "vocab")}
    abstract = jax.eval_shape(plan.init, KEY, random_params(config))
    places = jax.tree.map(lambda leaf, axes: named_sharding(axes, leaf.shape, mesh), abstract, axes)
    assert places["low_rank"]["layers.mlp.down"]["a"].spec == jax.P(None, "tensor", None)
    assert places["full"]["embed.table"].spec == jax.P(None, "fsdp")  # 61 tokens do not divide


def test_counts_the_active_rank_only(config):
    rules = [low_rank("layers.{0..2}.attention.q", rank=4), FullRule(match="layers.*.mlp.up"), FullRule(match="embed")]
    plan = UpdatePlan(rules).resolve(config, {"update.0.rank": 64})
    low, full, table = 3 * 4 * (32 + 32), 4 * 32 * 40, 61 * 32
    assert plan.trainable_parameters() == low + full + table
    assert plan.trainable_parameters({"update.0.rank": 8}) == 2 * low + full + table
    assert plan.flops() == {"layers.attention.q": 2.0 * 3 * (32 + 32) * 4}  # three layers of four, of rank 4
    assert plan.weight_shares() == {"layers.mlp.up.kernel": 1.0, "embed.table": 1.0}
    assert not plan.adapters_only
    assert plan.exports  # what is trained itself stands beside the adapter, and alone is none
    assert not UpdatePlan(rules[1:]).resolve(config).exports
    rows = plan.table()
    assert len({tuple(row) for row in rows}) == 1  # the same columns throughout
    assert [(row["rule"], row["method"], row["module"], row["layers"], row["parameters"]) for row in rows] == [
        ("update.0", "low_rank 4", "layers.attention.q", "0–2", low),
        ("update.1", "full", "layers.mlp.up.kernel", "0–3", full),
        ("update.2", "full", "embed.table", "", table),
        ("trained", "", "", "", low + full + table),
        ("all", "", "", "", count_parameters(config) + low),
    ]
    assert rows[-1]["share"] == "100.000%"
    share = (low + full + table) / (count_parameters(config) + low)
    assert rows[-2]["share"] == f"{100 * share:.3f}%"


@pytest.mark.parametrize(
    ("match", "hint"),
    [
        ("layers.*.attention.qq", "did you mean 'layers.*.attention.q'"),
        ("layers.attention.q", "did you mean 'layers.*.attention.q'"),
        ("layers.*.attention.{q,w}", "the alternative 'layers.*.attention.w'"),
        ("layers.9.mlp", "it has the layers 0 to 3"),
        ("layers.{2,4}.mlp", "the alternative 'layers.4.mlp'"),
        ("layers.*.self_attn.q_proj", "did you mean"),
        ("layers.*.atention.{q,v}", "did you mean 'layers.*.attention.q'"),
    ],
)
def test_a_rule_that_matches_nothing(config, match, hint):
    with pytest.raises(UserError) as error:
        UpdatePlan([FullRule(match="final_norm"), low_rank(match)]).resolve(config)
    assert str(error.value).startswith("update.1.match: ")
    assert "matches nothing" in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("match", "ours"),
    [
        ("q_proj", "layers.*.attention.q"),
        ("{q_proj,v_proj}", "**.{q,v}"),
        ("layers.*.self_attn.q_proj", "layers.*.attention.q"),
        ("model.layers.*.self_attn.{q_proj,v_proj}", "layers.*.attention.{q,v}"),
        ("**.down_proj", "**.down"),
        ("*.down_proj", "**.down"),
        ("layers.*.q_proj", "layers.*.attention.q"),
        ("model.layers.{0..1}.{q_proj,v_proj}", "layers.{0..1}.attention.{q,v}"),
        ("layers.*.{q_proj,up_proj}", "layers.*.*.{q,up}"),
        ("q_proj,v_proj", "**.{q,v}"),
        ("mlp.gate_proj", "layers.*.mlp.gate"),
        ("all-linear", "layers.*.{attention,mlp}.*"),
        ("model.norm", "final_norm"),
    ],
)
def test_the_names_of_a_checkpoint_are_answered_with_ours(config, match, ours):
    with pytest.raises(UserError) as error:
        UpdatePlan([low_rank(match)]).resolve(config)
    assert str(error.value).endswith(f"; did you mean {ours!r}?")
    # What is suggested is a rule.
    UpdatePlan([FullRule(match=ours)]).resolve(config)


def test_a_range_may_reach_beyond_the_last_layer(config):
    plan = UpdatePlan([low_rank("layers.{2..99}.mlp.up")]).resolve(config)
    assert plan.parts[0].rules == (-1, -1, 0, 0)


def test_other_plans_that_cannot_be_meant(config):
    tied = dict(declare(config))
    del tied["lm_head.kernel"]
    for rules, model, message in [
        ([], config, "there is no rule"),
        ([FrozenRule(match="**")], config, "every rule freezes"),
        ([low_rank("layers.*.*_norm")], config, "only layers.*.attention_norm.scale, layers.*.mlp_norm.scale"),
        (
            [low_rank("embed")],
            config,
            "use method 'full' or 'low_rank_embedding' for these, or match layers.*.attention.q",
        ),
        ([low_rank("**"), FullRule(match="**.bias")], config, "update.1.match: earlier rules (update.0)"),
        ([low_rank("lm_head")], tied, "its head is tied to embed.table"),
        ([low_rank("layers.{q")], config, "update.0.match: pattern 'layers.{q'"),
    ]:
        with pytest.raises(UserError) as error:
            UpdatePlan(rules).resolve(model)
        assert message in str(error.value)


def test_ranks_are_checked_on_the_host(config):
    plan = UpdatePlan([low_rank("**.q", rank=4)]).resolve(config)
    plan.check({})
    for rank in (0, 5):
        with pytest.raises(UserError, match=rf"update.0.rank: {rank} is not between 1 and the capacity 4"):
            plan.check({"update.0.rank": rank})


def test_layers_are_counted_from_the_end_too(config):
    plan = UpdatePlan([FullRule(match="layers.{-2..-1}.mlp"), FullRule(match="layers.-4.attention.q")]).resolve(config)
    layers = {part.path: part.rules for part in plan.parts}
    assert layers["layers.mlp.up.kernel"] == (-1, -1, 0, 0)
    assert layers["layers.attention.q.bias"] == (1, -1, -1, -1)
    with pytest.raises(UserError, match="has the layers 0 to 3"):
        UpdatePlan([FullRule(match="layers.-5.mlp")]).resolve(config)


def test_the_rate_falls_with_depth(config):
    rules = [
        FullRule(match="layers.{1,3}.mlp_norm", layer_decay=0.5),
        LowRankRule(match="**.q", rank=2, layer_decay=0.9),
        FullRule(match="{embed,final_norm,layers.0.mlp_norm}", layer_decay=0.25),
        FullRule(match="**.o"),
    ]
    plan = UpdatePlan(rules).resolve(config)
    factors = plan.layer_factors({}, {"update.1.layer_decay": jnp.float32(0.8)})
    assert factors["full"].keys() == {"layers.mlp_norm.scale", "embed.table", "final_norm.scale"}
    # Of the layers 0, 1 and 3 of four.
    np.testing.assert_allclose(factors["full"]["layers.mlp_norm.scale"], [0.25**3, 0.5**2, 1.0])
    np.testing.assert_allclose(factors["full"]["embed.table"], 0.25**4)
    np.testing.assert_allclose(factors["full"]["final_norm.scale"], 1.0)
    np.testing.assert_allclose(factors["low_rank"]["layers.attention.q"], [0.8**3, 0.8**2, 0.8, 1.0], rtol=1e-6)
    assert plan.layers == 4
