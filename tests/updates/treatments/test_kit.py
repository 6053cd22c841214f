"""What every update method keeps to, whoever wrote it: the methods of the package, and one that it lacks."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter

from jaxtune.config import dump_config, load_config, update_rules
from jaxtune.config.hyperparameters import hyperparameters
from jaxtune.config.training_sections import TrainConfig
from jaxtune.config.update_rules import Rule
from jaxtune.errors import UserError
from jaxtune.evaluation.groups import GroupedRows
from jaxtune.models import Decoder, DecoderConfig, load_model, random_model, save_model
from jaxtune.training import Trainer
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.training.population import Population
from jaxtune.training.stacked_adapters import StackedAdapters
from jaxtune.updates import UpdatePlan, merge_adapters, save_adapter, treatments
from jaxtune.updates.peft.load import read_adapter
from jaxtune.updates.treatments.base import LinearTreatment, Treatment
from tests.compiled_loops import collectives_in_loops

CONFIG = DecoderConfig(
    "qwen2", 48, 16, 24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, qkv_bias=True, initializer_range=0.3
)  # fmt: skip
ROWS, LENGTH = 8, 6
PAGE = Path(__file__).parents[3] / "docs" / "update_methods.md"
OTHERS = ("shira:Shira",)
TRAINED = [name for name, one in treatments.own().items() if one.trains]
METHODS = [*TRAINED, *OTHERS]
LINEAR = [f"layers.*.{module}" for module in ("attention.q", "attention.k", "attention.v", "attention.o")]
LINEAR += [f"layers.*.mlp.{module}" for module in ("gate", "up", "down")]
SMALL = {"rank": 2, "layers": 1, "rho": 1.0, "block_size": 4, "tokens": [20, 5]}
OWN = {"trainable_tokens": "embed", "bitfit": "**.bias", "norms": "layers.*.*_norm", "full": "final_norm"}
OWN |= {"low_rank_embedding": "embed"}
"""What the methods match that are not for linear layers."""


@pytest.fixture(scope="module", autouse=True)
def written_outside(tmp_path_factory) -> Any:
    """The file that the page shows, in a folder of its own."""
    folder = tmp_path_factory.mktemp("outside")
    (code,) = re.findall(r'^```python\n("""SHiRA.*?)^```', PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (folder / "shira.py").write_text(code)
    installed = folder / "shira-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: shira\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[jaxtune.treatments]\nshira = shira:Shira\n")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    forget()
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("shira", None)
    forget()


def forget() -> None:
    """What was found by name."""
    treatments.find.cache_clear()
    update_rules._validator.cache_clear()


def treatment_of(method: str) -> type[Treatment]:
    found = treatments.find(method)
    assert found is not None
    return found


def rule(method: str, match: str, **numbers: Any) -> Any:
    """A rule with the method's own defaults, but for sizes."""
    keys = treatment_of(method).Section.model_fields
    small = {name: size for name, size in SMALL.items() if name in keys}
    return TypeAdapter(Rule).validate_python({"match": match, "method": method, **small, **numbers})


def rules_of(methods: list[str]) -> list[Any]:
    """A rule for each method, each on modules of its own: one program has them all."""
    places = iter(LINEAR)
    first = [rule(method, match) for method, match in OWN.items() if method in methods]
    return first + [rule(method, next(places)) for method in methods if method not in OWN]


def chunks() -> list[list[str]]:
    """All methods, in as few programs as there are modules for: methods that match the same are in several."""
    linear = [*(name for name in TRAINED if name not in OWN), *OTHERS]
    found = [linear[at : at + len(LINEAR)] for at in range(0, len(linear), len(LINEAR))]
    for method in (name for name in TRAINED if name in OWN):
        free = (chunk for chunk in found if OWN[method] not in {OWN.get(other) for other in chunk})
        next(free).append(method)
    return found


CHUNKS = chunks()


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 48, (ROWS, LENGTH + 1)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((ROWS, LENGTH), np.float32)}


def make_trainer(methods: list[str], mesh: jax.sharding.Mesh | None = None, **options: Any) -> Trainer:
    model = random_model(CONFIG, jax.random.key(0), mesh=mesh)
    settings = TrainConfig(steps=4, batch_size=ROWS, sequence_length=LENGTH)
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0.0)
    return Trainer(model, UpdatePlan(rules_of(methods)), settings, optimizer, **options)


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_near(one: Any, other: Any, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, other)


def randomized(trainer: Trainer, scale: float = 0.1) -> Any:
    """A state whose trained arrays lie elsewhere than at the start, but for layers that no rule moves."""
    state, generator = trainer.init(), np.random.default_rng(0)

    def moved(leaf: Any, group: Any) -> Any:
        noise = scale * generator.standard_normal(leaf.shape)
        if None not in group.layers.values():
            still = set(range(len(leaf))).difference(*group.layers.values())
            noise[sorted(still)] = 0.0
        return leaf + jnp.asarray(noise, jnp.float32)

    return dataclasses.replace(state, trainable=jax.tree.map(moved, state.trainable, trainer.plan.groups()))


@pytest.fixture(scope="module", params=CHUNKS, ids=lambda methods: "+".join(methods))
def trainer(request, written_outside) -> Trainer:
    return make_trainer(request.param)


def logits(trainer: Trainer, params: Any, adapters: Any) -> np.ndarray:
    return np.asarray(trainer.program.decoder.merged(params)(batch()["tokens"], adapters=adapters))


def merged_params(trainer: Trainer, trainable: Any, fixed: Any) -> Any:
    """The weights of a model without adapters, made of the arrays by what each adapter does to the identity."""
    params, adapters = trainer.plan.apply(trainer.params, trainable, trainer.hyperparameters, fixed=fixed)
    if (embed := adapters.pop("embed", None)) is not None:
        params["embed.table"], _ = embed.merged(params["embed.table"], None)
    for path, adapter in adapters.items():
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], adapter.scanned()) for i in range(CONFIG.num_layers)]
        bias = params.get(f"{path}.bias")
        made = [
            one.joined(adapter.unscanned()).merged(params[f"{path}.kernel"][i], None if bias is None else bias[i])
            for i, one in enumerate(layers)
        ]
        params[f"{path}.kernel"] = jnp.stack([kernel for kernel, _ in made])
        if bias is not None:
            params[f"{path}.bias"] = jnp.stack([one for _, one in made])
    return params


def test_the_start_equals_the_base(trainer):
    base = logits(trainer, {**trainer.params, **trainer._owned}, {})
    state = trainer.init()
    assert_near(logits(trainer, *trainer.apply(state)), base, rtol=1e-5, atol=1e-5)
    # Whatever is drawn, it is drawn again; and by another seed it is still the base.
    assert_same(state, trainer.init())
    assert_near(logits(trainer, *trainer.apply(trainer.init(seed=1))), base, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_plain_weights_and_merged_equals_unmerged(trainer):
    state = randomized(trainer)

    def loss(trainable: Any, plain: bool) -> Any:
        if plain:
            params, adapters = merged_params(trainer, trainable, state.fixed), {}
        else:
            params, adapters = trainer.plan.apply(trainer.params, trainable, trainer.hyperparameters, fixed=state.fixed)
        out = trainer.program.decoder.merged(params)(batch()["tokens"], adapters=adapters)
        logs = jax.nn.log_softmax(out)
        return -jnp.mean(jnp.take_along_axis(logs, batch()["targets"][..., None], -1)), out

    (ours, our_logits), gradients = jax.jit(jax.value_and_grad(lambda t: loss(t, False), has_aux=True))(state.trainable)
    (plain, logits_), expected = jax.jit(jax.value_and_grad(lambda t: loss(t, True), has_aux=True))(state.trainable)
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)
    assert_near(our_logits, logits_, rtol=1e-4, atol=1e-4)
    assert_near(gradients, expected, rtol=2e-3, atol=2e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    model = random_model(CONFIG, jax.random.key(0))
    whole = merge_adapters(model, trainer.plan, state.trainable, trainer.hyperparameters, state.fixed)
    assert_near(np.asarray(whole(batch()["tokens"])), np.asarray(our_logits), rtol=1e-4, atol=1e-4)


def test_training_moves_what_it_should_and_resumes_to_the_bit(trainer, tmp_path):
    start = trainer.init()
    base = jax.tree.map(np.asarray, trainer.params)
    kept, fixed = start.copy(), jax.tree.map(np.asarray, start.fixed)
    state, _ = trainer.step(start, batch(0))
    state, _ = trainer.step(state, batch(1))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, state)
    checkpoints.wait()
    again, _ = checkpoints.restore(2, trainer.init())
    assert_same(again, state)

    def look(first: Any, last: Any, axes: tuple[str | None, ...]) -> None:
        moved = np.any(np.asarray(first != last).reshape(len(first), -1), axis=1)
        # Of tokens that are in no batch nothing moves.
        assert np.any(moved) if axes[0] == "vocab" else np.all(moved), "a layer stood still"

    jax.tree.map(look, kept.trainable, state.trainable, trainer.plan.axes())
    assert_same(state.fixed, fixed)
    assert_same(trainer.params, base)
    # Moments of what is trained, twice float32, and of nothing else.
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    moments = [leaf for leaf in jax.tree.leaves(state.moments) if np.issubdtype(leaf.dtype, np.floating)]
    assert sum(leaf.nbytes for leaf in moments) == 8 * trained
    one, other = (trainer.step(each, batch(2))[0] for each in (state, again))
    assert_same(one, other)
    assert trainer.traces["step"] == 1


def test_a_slot_of_a_population_is_a_run_alone(trainer):
    population, values = Population(trainer, 2, batched=True), [{}, {"optimizer.learning_rate": 3e-3}]
    values[1] |= {key: 1.0 for key in trainer.hyperparameters if key.endswith(".rank")}
    for slot in range(2):
        population.put(slot, trainer.init(values[slot], seed=slot), values[slot])
    for step in range(2):
        population.step({slot: batch(step) for slot in range(2)})
    assert population.traces == 1
    for slot in range(2):
        state = trainer.init(values[slot], seed=slot)
        for step in range(2):
            state, _ = trainer.step(state, batch(step), values[slot])
        assert_near(population.take(slot).trainable, state.trainable, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_states_answer_side_by_side(written_outside):
    trainer = make_trainer(["dora", "ia3", "vera", *OTHERS])
    states = [randomized(trainer), trainer.init(seed=1)]
    stacked = StackedAdapters(trainer, 2)([(state, {}) for state in states])
    rows = GroupedRows(random_model(CONFIG, jax.random.key(0)), stacked, jnp.array([1, 0]), None)
    tokens = jnp.asarray(np.stack([batch()["tokens"]] * 2))
    found = rows.logits(rows.extend(tokens, rows.empty_cache(ROWS, LENGTH))[0])
    for ours, state in zip(found, reversed(states), strict=True):
        assert_near(ours, logits(trainer, *trainer.apply(state)), rtol=1e-3, atol=1e-4)


def test_a_mesh_computes_what_one_device_does(trainer, mesh):
    cut = make_trainer([one.method for one in trainer.plan.rules], mesh)
    arguments = ({**cut.params, **cut._owned}, jax.random.key(0), cut.traced_values(), None, None)
    # Nothing orders them with those outside of the loop: on a CPU, whose threads wait in them, init hung now and then.
    assert not collectives_in_loops(cut._init.lower(*arguments).compile().as_text() or "")
    one, many = (each.step(each.init(), batch())[1] for each in (trainer, cut))
    for name in ("loss", "grad_norm"):
        assert float(one[name]) == pytest.approx(float(many[name]), rel=1e-4), name


def test_the_table_counts_what_is_trained(trainer):
    rows = trainer.plan.table()
    counts = {row["rule"]: row["parameters"] for row in rows}
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainer.init().trainable))
    assert counts["trained"] == trained == trainer.plan.trainable_parameters()
    assert {row["method"].split(" ")[0] for row in rows[:-2]} == {one.method for one in trainer.plan.rules}
    assert trainer.step_flops().total > 0


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_told(method, written_outside):
    treatment = treatment_of(method)
    with pytest.raises(UserError, match=r"update\.0\.match: .* matches nothing"):
        UpdatePlan([rule(method, "layers.*.attention.w")]).resolve(CONFIG)
    if method not in OWN:
        other = next(name for name in METHODS if name != method and name not in OWN)
        two = UpdatePlan([rule(method, "layers.0.attention.q"), rule(other, "**.q")])
        with pytest.raises(UserError, match=f"update.1: layers.attention.q has layers of method {method}"):
            two.resolve(CONFIG)
    if issubclass(treatment, LinearTreatment) and method not in OWN:
        with pytest.raises(UserError, match=f"update.0: method {method} is for {treatment.needs}"):
            UpdatePlan([rule(method, "layers.*.mlp_norm")]).resolve(CONFIG)
        if not treatment.serves_head:
            with pytest.raises(UserError, match=f"update.0: method {method} does not serve lm_head"):
                UpdatePlan([rule(method, "lm_head")]).resolve(CONFIG)
    plan = UpdatePlan([rule(method, OWN.get(method, "layers.**"))]).resolve(CONFIG)
    for key in plan.rooms():
        with pytest.raises(UserError, match=f"{key}: 3 is not between 1 and the capacity 2"):
            plan.check({key: 3})


OWNER = '''
import dataclasses
from typing import Literal

import jax.numpy as jnp

from jaxtune.config.rule import RuleConfig
from jaxtune.updates.treatments.base import Effect, Shape
from jaxtune.updates.treatments.full import Full


class DifferenceRule(RuleConfig):
    """A difference is trained."""

    method: Literal["difference"] = "difference"


class Difference(Full):
    """The weights lie in the state, and a difference beside them."""

    Section = DifferenceRule

    @property
    def owns(self):
        return frozenset({self.path})

    def fixed(self):
        return {"begun": Shape(self.shape, self.axes)}

    def init(self, key, base, values):
        begun = base[self.path].astype(jnp.float32)
        return jnp.zeros_like(begun), {"begun": begun + 0.0}

    def apply(self, base, arrays, fixed, values, seed):
        assert self.path not in base
        return Effect({self.path: fixed["begun"] + arrays})
'''


def test_arrays_that_a_method_owns_leave_the_base(tmp_path, monkeypatch):
    (tmp_path / "difference.py").write_text(OWNER)
    monkeypatch.syspath_prepend(str(tmp_path))
    model, path = random_model(CONFIG, jax.random.key(0)), "layers.mlp_norm.scale"
    settings = TrainConfig(steps=2, batch_size=ROWS, sequence_length=LENGTH)
    losses = []
    for method in ("difference:Difference", "full"):
        trainer = Trainer(model, UpdatePlan([rule(method, "layers.*.mlp_norm")]), settings)
        assert (path in trainer.params) == (method == "full")
        state, _ = trainer.step(trainer.init(), batch())
        losses.append(float(trainer.step(state, batch())[1]["loss"]))
        whole, _ = trainer.apply(trainer.init())
        np.testing.assert_array_equal(whole[path], 1.0)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_another_package_s_method_is_found_by_either_name(written_outside, tmp_path):
    import shira  # pyright: ignore[reportMissingImports]

    assert treatments.find("shira") is shira.Shira
    assert "shira" in treatments.names()
    text = "model: {path: m}\ndata: {train: a.jsonl, completion: '{a}'}\ntrain: {steps: 2}\n"
    for name in ("shira", "shira:Shira"):
        file = tmp_path / "run.yaml"
        file.write_text(f"{text}update: [{{match: '**.q', method: '{name}', rank: 3}}]\n")
        config = load_config(file)
        assert config.update[0].method == name
        assert isinstance(config.update[0], shira.ShiraRule)
        # Written to a run's directory and read there, it is the same.
        file.write_text(dump_config(config))
        assert load_config(file).update == config.update
        assert "update.0.learning_rate_scale" in hyperparameters(config)
        with pytest.raises(UserError, match=r"update\.0\.rnk: unknown key; did you mean 'rank'"):
            load_config(file, ["update.0.rnk=3"])
        with pytest.raises(UserError, match=r"update\.0\.rank: Input should be greater than 0"):
            load_config(file, ["update.0.rank=0"])


def test_a_configuration_is_read_without_jax(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\ndata: {train: a.jsonl, completion: '{a}'}\ntrain: {steps: 2}\n")
    code = "import sys; from jaxtune.config import load_config; load_config(sys.argv[1]); "
    code += "print({'jax', 'numpy'} & {*sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code, str(file)], cwd=PAGE.parents[1], capture_output=True, text=True)
    assert ended.stdout == "set()\n", ended.stderr


def test_a_method_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "broken_method.py").write_text("class Other: pass\nraise_later = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for method, message in [
        ("low_rnk", "'low_rnk' found using 'method'"),
        ("prefix_tuning", "'prefix_tuning' is not offered: .* low_rank on layers"),
        ("p_tuning", "'p_tuning' is not offered: .* trainable_tokens on"),
        ("nowhere:Shira", "cannot be imported"),
        ("broken_method:Shira", "cannot be imported"),
        ("broken_method:Other", "is no Treatment"),
    ]:
        with pytest.raises(ValueError, match=message):
            TypeAdapter(Rule).validate_python({"match": "**", "method": method})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_model(random_model(CONFIG, jax.random.key(0)), directory)
    return directory


EXPORTED = [
    method
    for method in METHODS
    if method in OTHERS or treatments.own()[method].peft_type or treatments.own()[method].alone
]
# To PEFT these are LoRA, of which one is enough for every day.
AS_LORA = ("eva", "lora_fa", "lora_plus", "olora", "orthogonal", "rslora", "s2ft")


@pytest.mark.parametrize(
    "method", [pytest.param(one, marks=[pytest.mark.slow] if one in AS_LORA else []) for one in EXPORTED]
)
def test_an_adapter_is_read_back_and_by_peft(method, base, tmp_path, written_outside):
    model: Decoder = load_model(base, dtype="float32")
    matched = [OWN[method]] if method in OWN else ["layers.*.{attention.q,mlp.down}", "layers.0.attention.v"]
    plan = UpdatePlan([rule(method, match) for match in matched])
    trainer = Trainer(model, plan, TrainConfig(steps=1, batch_size=ROWS, sequence_length=LENGTH))
    state = randomized(trainer)
    trainer.save_adapter(tmp_path, state, base=str(base))
    merged = merge_adapters(model, trainer.plan, state.trainable, trainer.hyperparameters, state.fixed)
    ours = np.asarray(merged(batch()["tokens"]))
    read = read_adapter(tmp_path, model)
    again = merge_adapters(model, read.plan.resolve(model), read.trainable, read.values, read.fixed)
    assert_near(np.asarray(again(batch()["tokens"])), ours, rtol=1e-4, atol=1e-4)
    # Written again, it is the same: nothing is lost on the way.
    save_adapter(
        tmp_path / "again", read.plan.resolve(model), read.trainable, read.values, model, str(base), None, read.fixed
    )
    files = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]

    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        out = adapted(torch.from_numpy(batch()["tokens"]).long()).logits.numpy()
    assert_near(out, ours, rtol=2e-3, atol=2e-3)
    assert np.abs(out - np.asarray(model(batch()["tokens"]))).max() > 0.1, "the adapter did nothing"
