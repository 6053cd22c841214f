"""Soft prompts: where they stand in rows and in generation, and PEFT's adapters of them."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune.cli.trained import next_steps
from jaxtune.config import load_config
from jaxtune.data.examples import Example, fronted
from jaxtune.data.packing import make_batch
from jaxtune.data.pipeline import Plan
from jaxtune.errors import UserError
from jaxtune.evaluation.generation import Generator
from jaxtune.models import DecoderConfig, load_model, random_model, save_model
from jaxtune.models.decoder import split
from jaxtune.updates import UpdatePlan, merge_adapters, save_adapter
from jaxtune.updates.peft.load import load_adapters, read_adapter
from jaxtune.updates.treatments.bitfit import BitFitRule
from jaxtune.updates.treatments.prompt_tuning import PromptTuningRule

# Gemma's factor is on embeddings of tokens, and not on what PEFT puts in front of them.
CONFIG = DecoderConfig(
    "qwen2", 48, 16, 24, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, qkv_bias=True, initializer_range=0.3
)  # fmt: skip
RULE = PromptTuningRule(match="embed", length=3, tokens=[20, 5])
DOCUMENTS = [[7, 8, 9, 10], [11, 12], [30, 31, 32]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(random_model(CONFIG, jax.random.key(0)), directory)
    return directory


def applied(model, scale=0.0):
    plan = UpdatePlan([RULE]).resolve(model)
    params = split(model)[1]
    trainable = plan.init(jax.random.key(0), params)
    noise = scale * np.random.default_rng(0).standard_normal((3, 16))
    trainable = {**trainable, "prompt_tuning": {"embed": trainable["prompt_tuning"]["embed"] + noise}}
    return plan, trainable, plan.apply(params, trainable, {})[1]


def example(tokens: list[int], index: int = 0) -> Example:
    weights = np.array([0.0, *[1.0] * (len(tokens) - 1)], np.float32)
    return Example(np.array(tokens, np.int32), weights, index, 1, {}, "")


def test_each_document_of_a_row_has_it_in_front(base):
    model = load_model(base, dtype="float32")
    examples = [example([*tokens, 1], index) for index, tokens in enumerate(DOCUMENTS)]
    behind = fronted(examples, 3)
    assert fronted(examples, 0) is examples
    assert [len(one.tokens) for one in behind[:2]] == [8, 6]
    assert behind[0].prompt.tolist() == [0, 0, 0, 7]
    plan = Plan(behind, sequence_length=18, seed=None, packing=True)
    batch = make_batch(behind, plan.rows(0), 18)
    assert batch["segment_ids"].shape == (1, 18)
    assert batch["weights"].sum() == 9.0  # that of every document's tokens, and no more
    np.testing.assert_array_equal(batch["positions"][0][:9], [0, 1, 2, 3, 4, 5, 6, 0, 1])
    adapters = applied(model)[2]
    arguments = batch["positions"], batch["segment_ids"]
    packed = np.asarray(model(batch["tokens"], *arguments, adapters=adapters))[0]
    # It starts as tokens, over and over.
    at = 0
    for tokens in DOCUMENTS:
        alone = np.asarray(model(np.array([[20, 5, 20, *tokens]], np.int32)))[0]
        np.testing.assert_allclose(packed[at : at + len(alone)], alone, rtol=1e-4, atol=1e-4)
        at += len(alone)


def test_answers_come_behind_it(base):
    model = load_model(base, dtype="float32")
    adapters = applied(model, scale=0.5)[2]
    static, params = split(model)
    generator = Generator(static, max_new_tokens=3, batch_size=2, eos_ids=(), pad_id=0, context=64)
    prompts = [[7, 8, 9], [11]]
    answers = generator(params, adapters, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [0, 0, 0, *prompt]
        for _ in range(3):
            out = np.asarray(model(np.array([tokens], np.int32), adapters=adapters))[0, -1]
            tokens.append(int(out.argmax()))
        assert answer == tokens[-3:]
    assert answers != generator(params, None, prompts)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), adapters)
    assert generator.side_by_side(params, states, [prompts, prompts[:1]]) == [answers, answers[:1]]


@pytest.mark.parametrize("theirs_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_peft_s_adapters_are_read_and_written(theirs_first, base, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    model = load_model(base, dtype="float32")
    tokens = np.array(DOCUMENTS[0:1], np.int32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if theirs_first:
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        adapted = peft.get_peft_model(theirs, settings)
        adapted.save_pretrained(tmp_path)
    else:
        plan, trainable, _ = applied(model, scale=0.5)
        save_adapter(tmp_path, plan, trainable, {}, model, str(base))
        assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        expected = adapted.eval()(torch.from_numpy(tokens).long()).logits.numpy()
    read = read_adapter(tmp_path, model)
    adapters = read.plan.resolve(model).apply(split(model)[1], read.trainable, read.values)[1]
    ours = np.asarray(model(np.concatenate([np.zeros((1, 3), np.int32), tokens], axis=1), adapters=adapters))
    np.testing.assert_allclose(ours[:, -4:], expected[:, -4:], rtol=1e-3, atol=1e-3)
    assert np.abs(ours[:, 3:] - np.asarray(model(tokens))).max() > 0.1


def test_bad_input(base, tmp_path):
    model = load_model(base, dtype="float32")
    plan, trainable, _ = applied(model)
    with pytest.raises(UserError, match="a soft prompt stands in front of the tokens and cannot be merged"):
        merge_adapters(model, plan, trainable, {})
    with pytest.raises(UserError, match=r"update\.0\.tokens: the model has the tokens 0 to 47, not \[50\]"):
        UpdatePlan([PromptTuningRule(match="embed", tokens=[1, 50])]).resolve(CONFIG)
    with pytest.raises(UserError, match=r"update\.0: method prompt_tuning stands alone: .* beside bitfit, and it"):
        UpdatePlan([RULE, BitFitRule(match="**.bias")]).resolve(CONFIG)
    save_adapter(tmp_path, plan, trainable, {}, model, str(base))
    with pytest.raises(UserError, match="is no plain LoRA"):
        load_adapters({"one": tmp_path}, model)
    file = tmp_path / "adapter_config.json"
    told: dict[str, Any] = json.loads(file.read_text())
    assert told["num_virtual_tokens"] == 3
    assert "target_modules" not in told
    file.write_text(json.dumps(told | {"num_virtual_tokens": 4}))
    with pytest.raises(UserError, match=r"prompt_embeddings has shape \(3, 16\), not \(4, 16\)"):
        read_adapter(tmp_path, model)


def test_the_command_that_comes_next_exports_the_adapter(tmp_path):
    text = "run_dir: out\nmodel: {path: m}\ndata: {train: a.jsonl, completion: '{a}'}\ntrain: {steps: 2}\n"
    file = tmp_path / "run.yaml"
    for rule, option in (
        ("match: embed, method: prompt_tuning", "--peft"),
        ("match: '**.q', method: low_rank", "--merged"),
    ):
        file.write_text(f"{text}update: [{{{rule}}}]\n")
        assert f"export {load_config(file).directory} {option} " in next_steps(load_config(file), {})[-1]
