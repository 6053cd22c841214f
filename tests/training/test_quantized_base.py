"""Adapters beside a base of few bits: they train as beside the kernels that the codes stand for."""

from __future__ import annotations

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config import load_config
from jaxtune.config.training_sections import TrainConfig
from jaxtune.errors import UserError
from jaxtune.evaluation.generation import Generator
from jaxtune.models import Decoder, DecoderConfig, load_model, random_model, save_model, split
from jaxtune.models.weight import quantized_stack
from jaxtune.parallel import make_mesh
from jaxtune.training import Trainer
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.memory import StepMemory, check_base
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.training.population import Population
from jaxtune.updates import UpdatePlan, merge_adapters
from jaxtune.updates.treatments.dora import DoraRule
from jaxtune.updates.treatments.frozen import FrozenRule
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule
from jaxtune.updates.treatments.pissa import PissaRule
from tests.compiled_loops import collectives_in_loops

CONFIG = DecoderConfig(
    "llama", vocab_size=50, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, initializer_range=0.1,
)  # fmt: skip
REST = 'data: {train: rows.jsonl, prompt: "a", completion: "b"}\ntrain: {steps: 1}\n'
RULES = [
    LowRankRule(match="layers.*.attention.{q,v}", rank=4, alpha=8.0),
    LowRankRule(match="layers.1.mlp.down", rank=2, alpha=4.0),
    FullRule(match="layers.*.*norm.scale"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_model(random_model(CONFIG, jax.random.key(0), dtype="float32"), path)
    return path


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory, dtype="float32", quantize="nf4")


@pytest.fixture(scope="module")
def plain(model):
    """What the codes of the model stand for, float32."""
    params = dict(split(model)[1])
    for path in [path.removesuffix(".codes") for path in params if path.endswith(".codes")]:
        stack = quantized_stack(params, path)
        assert stack is not None
        params[path] = stack.dequantized(jnp.float32)
        del params[f"{path}.codes"], params[f"{path}.absmax"]
    return Decoder(CONFIG, params)


def trainer_of(model, rules=RULES, accumulate=2):
    train = TrainConfig(steps=8, batch_size=4, sequence_length=16, accumulate=accumulate)
    return Trainer(model, UpdatePlan(list(rules)), train, OptimizerConfig(learning_rate=3e-2))


@pytest.fixture(scope="module")
def trainer(model):
    return trainer_of(model)


def batch(seed=0):
    """Four rows of two documents each, and some padding."""
    tokens = np.random.default_rng(seed).integers(3, 50, (4, 17)).astype(np.int32)
    segments = np.repeat([[1] * 6 + [2] * 8 + [0] * 2], 4, axis=0).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (segments > 0).astype(np.float32),
        "segment_ids": segments,
    }


def trained(trainer, steps=3):
    """The losses of the first steps."""
    state, losses = trainer.init(), []
    for step in range(steps):
        state, metrics = trainer.step(state, batch(step % 2))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def losses(trainer):
    """Of the quantized base."""
    return trained(trainer)


def test_training_is_that_of_the_kernels_that_the_codes_stand_for(losses, plain):
    """With packed rows, accumulation and norms that train."""
    np.testing.assert_allclose(losses, trained(trainer_of(plain)), rtol=1e-4)
    assert losses[2] < losses[0]


def test_a_stopped_run_goes_on_to_the_bit_from_a_base_that_is_read_again(trainer, directory, tmp_path, monkeypatch):
    """A checkpoint holds no codes: they are made again, of the same weights, and are the same."""
    data = [batch(seed) for seed in range(3)]
    whole, checkpoints = trainer.fit(data, listener=None), Checkpoints(tmp_path / "checkpoints")
    trainer.fit(data, until=5, checkpoints=checkpoints, listener=None)
    again = split(load_model(directory, dtype="float32", quantize="nf4"))[1]
    again = {path: jax.device_put(again[path], held.sharding) for path, held in trainer.params.items()}
    assert any(path.endswith(".codes") for path in again)
    jax.tree.map(np.testing.assert_array_equal, again, trainer.params)
    monkeypatch.setattr(trainer, "params", again)
    gone_on = trainer.fit(data, checkpoints=checkpoints, listener=None)
    checkpoints.close()
    assert (gone_on.steps_run, gone_on.step) == (3, 8)
    jax.tree.map(np.testing.assert_array_equal, gone_on.state, whole.state)
    assert trainer.traces["step"] == 1


@pytest.mark.slow
def test_a_population_and_a_mesh_train_as_one_device(trainer, losses, directory):
    population = Population(trainer, 2)
    for slot, seed in enumerate((None, 5)):
        population.put(slot, trainer.init(seed=seed))
    together = [float(population.step({slot: batch(step % 2) for slot in range(2)})[0]["loss"]) for step in range(3)]
    np.testing.assert_allclose(together, losses, rtol=1e-4)

    cut = trainer_of(load_model(directory, make_mesh(1, 2, 2, jax.devices()[:4]), dtype="float32", quantize="nf4"))
    np.testing.assert_allclose(trained(cut), losses, rtol=1e-4)


@pytest.mark.slow
def test_methods_that_read_kernels_read_what_the_codes_stand_for(model):
    """PiSSA starts from them, DoRA from their norms: the model then computes what the base does."""
    rules = [PissaRule(match="layers.*.attention.q", rank=4, alpha=8.0), DoraRule(match="layers.*.mlp.up", rank=4)]
    plan, params = UpdatePlan(rules).resolve(model), split(model)[1]
    trainable, fixed = plan.start(jax.random.key(0), params, {})
    _, adapters = plan.apply(params, trainable, {}, fixed=fixed)
    assert float(jnp.abs(trainable["dora"]["layers.mlp.up"]["m"]).min()) > 0.1
    tokens = batch()["tokens"]
    np.testing.assert_allclose(model(tokens, adapters=adapters), model(tokens), rtol=1e-3, atol=1e-4)


def test_dora_looks_at_one_kernel_at_a_time(plain, directory):
    """No array of all layers' kernels is made, and devices that have a part each wait for no other inside of a loop."""
    mesh = make_mesh(1, 2, 2, jax.devices()[:4])
    model = load_model(directory, mesh, dtype="float32", quantize="nf4")
    plan = UpdatePlan([DoraRule(match="layers.*.mlp.{up,down}", rank=4, alpha=2.0)]).resolve(model)
    params, draw = split(model)[1], np.random.default_rng(0)
    start = jax.jit(lambda params: plan.start(jax.random.key(0), params, {}, mesh))
    trainable, fixed = start(params)
    for arrays in trainable["dora"].values():
        arrays |= {name: jnp.asarray(draw.normal(size=each.shape), jnp.float32) for name, each in arrays.items()}

    @jax.jit
    def factors(params, trainable, fixed):
        adapters = plan.apply(params, trainable, {}, None, fixed, mesh)[1]
        return {path: adapter.arrays["factor"] for path, adapter in adapters.items()}

    for path, found in factors(params, trainable, fixed).items():
        a, b, m = (np.asarray(trainable["dora"][path][name], np.float64) for name in "abm")
        weights = np.asarray(split(plain)[1][f"{path}.kernel"], np.float64) + 0.5 * a @ b
        np.testing.assert_allclose(found, m / np.linalg.norm(weights, axis=1), rtol=1e-4)
    for program, arguments in ((start, (params,)), (factors, (params, trainable, fixed))):
        text = program.lower(*arguments).compile().as_text() or ""
        assert not collectives_in_loops(text)
        shapes = [[*map(int, found.split(","))] for found in re.findall(r"(?:f32|bf16)\[(2(?:,\d+)+)\]", text)]
        # A device has a quarter of the codes.
        assert shapes
        assert max(map(math.prod, shapes)) < 2 * 64 * 96 // 4


def test_what_is_decomposed_is_brought_together_before_the_loop(directory):
    """Codes as well as kernels; see ``Treatment.whole``."""
    mesh = make_mesh(1, 2, 2, jax.devices()[:4])
    rules = [PissaRule(match="layers.*.attention.q", rank=4, alpha=8.0)]
    cut = trainer_of(load_model(directory, mesh, dtype="float32", quantize="nf4"), rules)
    arguments = (cut.params, jax.random.key(0), cut.traced_values(), None, None)
    assert not collectives_in_loops(cut._init.lower(*arguments).compile().as_text() or "")


@pytest.mark.slow
def test_answers_are_those_of_the_kernels_that_the_codes_stand_for(model, plain):
    prompts = [[3, 4, 5], [6, 7]]
    answers = [
        Generator(split(each)[0], max_new_tokens=4, batch_size=2, eos_ids=set(), pad_id=0, context=64)(
            split(each)[1], None, prompts
        )
        for each in (model, plain)
    ]
    assert answers[0] == answers[1]


def test_exports(trainer, model, directory, tmp_path):
    """An adapter names the base as it is on disk; merged kernels are bfloat16 of what codes and adapters give."""
    rules = RULES[:2]
    small = trainer_of(model, rules)
    state = small.init()
    for arrays in state.trainable["low_rank"].values():
        arrays["b"] = 0.1 * jnp.ones_like(arrays["b"])
    small.save_adapter(tmp_path / "adapter", state, base=str(directory))
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        directory
    )
    assert "nf4 codes" in (tmp_path / "adapter/README.md").read_text()
    merged = merge_adapters(model, small.plan, state.trainable, small.hyperparameters)
    found, base = split(merged)[1], split(model)[1]
    assert {array.dtype for array in found.values()} == {jnp.dtype("bfloat16")}
    low_rank = state.trainable["low_rank"]["layers.attention.q"]
    kernel = quantized_stack(base, "layers.attention.q.kernel")
    assert kernel is not None
    wanted = kernel.dequantized(jnp.float32) + 2.0 * jnp.matmul(low_rank["a"], low_rank["b"], precision="highest")
    np.testing.assert_allclose(
        np.asarray(found["layers.attention.q.kernel"], np.float32), wanted, rtol=2**-8, atol=1e-6
    )
    untouched = quantized_stack(base, "layers.mlp.up.kernel")
    assert untouched is not None
    np.testing.assert_array_equal(
        np.asarray(found["layers.mlp.up.kernel"], np.float32),
        np.asarray(untouched.dequantized(jnp.float32).astype(jnp.bfloat16), np.float32),
    )


def test_codes_are_not_trained(model):
    with pytest.raises(
        UserError, match=r"update.1: method 'full' trains layers.\*.mlp.up.kernel, which model.quantize"
    ):
        UpdatePlan([RULES[0], FullRule(match="layers.0.mlp.up")]).resolve(model)
    UpdatePlan([RULES[0], FrozenRule(match="layers.0.mlp.up")]).resolve(model)


def test_the_memory_of_a_dry_run_counts_codes(trainer, directory, tmp_path, monkeypatch):
    counted = StepMemory.__new__(StepMemory)
    counted.trainer = trainer
    entries = sum(array.size for path, array in trainer.params.items() if path.endswith(".codes"))
    others = sum(array.nbytes for path, array in trainer.params.items() if not path.endswith(".codes"))
    assert counted._base() == entries // 2 + others
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {directory}, quantize: nf4}}\n{REST}")
    monkeypatch.setattr("jaxtune.training.memory.free_bytes", lambda mesh: counted._base())
    check_base(load_config(file))
    with pytest.raises(UserError, match=r"the parameters of .* set model.quantize"):
        check_base(load_config(file, ["model.quantize=null"]))


def test_random_weights_are_not_quantized(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: base}}\n{REST}")
    with pytest.raises(UserError, match=r"model.quantize.*leave model.quantize out"):
        load_config(file, ["model.initialize=random", "model.quantize=nf4"])
    with pytest.raises(UserError, match=r"'nf4', 'int8' or 'fp8'|did you mean 'nf4'"):
        load_config(file, ["model.quantize=nf5"])
