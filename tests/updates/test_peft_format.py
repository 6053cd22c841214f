"""Adapters to and from PEFT, against peft and transformers themselves."""

from __future__ import annotations

import json
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.errors import UserError
from jaxtune.models.decoder import merge, split
from jaxtune.models.loading import load_model
from jaxtune.models.saving import save_model
from jaxtune.models.tokenizer import load_tokenizer
from jaxtune.updates import UpdatePlan, load_adapter, merge_adapters, save_adapter
from jaxtune.updates.peft.base import follow_base
from jaxtune.updates.treatments.base import NO_RULE
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.ia3 import Ia3Rule
from jaxtune.updates.treatments.low_rank import LowRankRule
from jaxtune.updates.treatments.trainable_tokens import TrainableTokensRule

# Mixed ranks and alphas, some layers only, most linear modules; a head of its own only where there is one.
MIXED = (
    LowRankRule(match="layers.{0,2}.attention.{q,v}", rank=3, alpha=5.0),
    LowRankRule(match="layers.1.attention.q", rank=6, alpha=4.0),
    LowRankRule(match="layers.*.mlp.{up,down}", rank=4, alpha=8.0),
    LowRankRule(match="layers.*.attention.o", rank=2, alpha=3.5),
)


def rules_for(family, rslora):
    headed = ("llama", "gemma3")
    rules = MIXED if family not in headed else (*MIXED, LowRankRule(match="lm_head", rank=5, alpha=7.0))
    return [rule.model_copy(update={"use_rslora": rslora}) for rule in rules]


def fixed(rules, model, random_trainable):
    plan = UpdatePlan(rules).resolve(model)
    return plan, random_trainable(jax.eval_shape(plan.init, jax.random.key(0), split(model)[1]))


def our_logits(model, plan, trainable, values, tokens):
    static, params = split(model)

    @jax.jit
    def run(params, trainable):
        merged, adapters = plan.apply(params, trainable, values)
        return merge(static, merged)(tokens, adapters=adapters)

    return np.asarray(run(params, trainable))


def peft_model(adapter, plan):
    """The model that peft makes of an adapter on the base that it names, which must hold what the plan adapts alone."""
    peft = pytest.importorskip("peft")
    import transformers
    from peft.tuners.lora import LoraLayer
    from peft.utils.save_and_load import load_peft_weights

    settings = peft.PeftConfig.from_pretrained(adapter)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        settings.base_model_name_or_path, attn_implementation="eager"
    )
    # Asked of the model, not of our tables: what turns tokens into logits, and what turns images into tokens.
    language = {*base.get_decoder().modules(), base.get_output_embeddings()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of what is missing
        model = peft.PeftModel.from_pretrained(base, adapter)
    loaded = peft.set_peft_model_state_dict(model, load_peft_weights(str(adapter)))
    assert not loaded.unexpected_keys
    assert not [name for name in loaded.missing_keys if "lora_" in name]
    adapted = {module for module in model.modules() if isinstance(module, LoraLayer)}
    assert len(adapted) == sum(rule != NO_RULE for module in plan.parts for rule in module.rules)
    assert {module.base_layer for module in adapted} <= language
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3"])
def test_peft_and_merged_export_compute_what_we_compute(
    family, rslora, checkpoint, random_trainable, tokens, torch_logits, tmp_path
):
    directory = checkpoint(family)
    model = load_model(directory, dtype="float32")
    plan, trainable = fixed(rules_for(family, rslora), model, random_trainable)
    ours = our_logits(model, plan, trainable, {}, tokens)
    untuned = np.asarray(model(tokens))
    assert np.abs(ours - untuned).max() > 0.1  # the adapter does something

    adapter = tmp_path / "adapter"
    save_adapter(adapter, plan, trainable, {}, model, str(directory))
    theirs = torch_logits(peft_model(adapter, plan), tokens)
    print(f"{family}, rslora {rslora}: largest difference from PEFT's logits {np.abs(theirs - ours).max():.1e}")
    np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=0)

    # Back again: the same adapter.
    again, arrays, values = load_adapter(adapter, model)
    np.testing.assert_allclose(our_logits(model, again.resolve(model), arrays, values, tokens), ours, atol=1e-5)

    if rslora:
        return  # merging knows of scales only
    import transformers

    merged = merge_adapters(model, plan, trainable, {})
    np.testing.assert_allclose(np.asarray(merged(tokens)), ours, atol=1e-4, rtol=0)
    save_model(merged, tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    np.testing.assert_allclose(torch_logits(loaded, tokens), ours, atol=1e-4)


def test_rslora_on_some_rules_only(checkpoint, random_trainable, tokens, torch_logits, tmp_path):
    directory = checkpoint("qwen2")
    model = load_model(directory, dtype="float32")
    rules = [
        LowRankRule(match="layers.*.attention.q", rank=4, alpha=8.0, use_rslora=True),
        LowRankRule(match="layers.*.attention.v", rank=3, alpha=8.0),
    ]
    plan, trainable = fixed(rules, model, random_trainable)
    save_adapter(tmp_path, plan, trainable, {}, model, str(directory))
    ours = our_logits(model, plan, trainable, {}, tokens)
    np.testing.assert_allclose(torch_logits(peft_model(tmp_path, plan), tokens), ours, atol=1e-4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is False


def test_the_files_are_those_that_peft_writes(checkpoint, random_trainable, tmp_path):
    model = load_model(checkpoint("qwen2"), dtype="float32")
    rules = [LowRankRule(match="layers.*.attention.{q,v}", rank=4, alpha=8.0, dropout=0.1)]
    plan = UpdatePlan(rules).resolve(model, {"update.0.rank": 16})
    trainable = random_trainable(jax.eval_shape(plan.init, jax.random.key(0), split(model)[1]))
    save_adapter(tmp_path, plan, trainable, {"update.0.rank": 3.0, "update.0.alpha": 6.5}, model, "some/base", "main")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    text = (tmp_path / "adapter_config.json").read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True) + "\n"
    assert len(values) == 19
    assert {key: value for key, value in values.items() if value not in (None, False, {})} == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "revision": "main",
        "r": 3,
        "lora_alpha": 6.5,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: value.shape for name, value in tensors.items() if ".layers.1." in name} == {
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": (3, 32),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": (32, 3),
        "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight": (3, 32),
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight": (16, 3),
    }
    assert len(tensors) == 12


def test_reads_what_peft_writes(checkpoint, tokens, torch_logits, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    import transformers

    directory = checkpoint("qwen3")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=r".*\.(q_proj|down_proj)",
        rank_pattern={r".*\.0\.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 3},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.3 * torch.randn(weight.shape))
    model.save_pretrained(tmp_path)
    ours = load_model(directory, dtype="float32")
    plan, trainable, values = load_adapter(tmp_path, ours)
    logits = our_logits(ours, plan.resolve(ours), trainable, values, tokens)
    np.testing.assert_allclose(logits, torch_logits(model, tokens), atol=1e-4)
    assert values["update.0.rank"] == 2.0
    assert [rule.match for rule in plan.rules] == [
        "layers.0.attention.q",
        "layers.{1,2}.attention.q",
        "layers.*.mlp.down",
    ]


# As peft and tools over it say that only the language model is adapted.
LANGUAGE_MODEL = [
    r".*language_model.*\.(q_proj|down_proj)",
    r"^(?!.*vision).*\.(q_proj|down_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.\d+\.mlp\.(?:up_proj))",
]


@pytest.mark.parametrize("pattern", LANGUAGE_MODEL)
def test_reads_what_peft_writes_for_the_language_model_of_a_larger_one(
    pattern, checkpoint, tokens, torch_logits, tmp_path
):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    import transformers

    directory = checkpoint("gemma3")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=pattern,
        rank_pattern={r"language_model.layers.0.self_attn.q_proj": 2},
        alpha_pattern={r"model\.language_model\..*down_proj": 3},
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.3 * torch.randn(weight.shape))
    theirs.save_pretrained(tmp_path)
    expected = torch_logits(theirs, tokens)
    model = load_model(directory, dtype="float32")
    plan, trainable, values = load_adapter(tmp_path, model)
    assert [(rule.match, rule.rank, rule.alpha) for rule in plan.rules] == [
        ("layers.0.attention.q", 2, 6),
        ("layers.{1,2}.attention.q", 4, 6),
        ("layers.*.mlp.down", 4, 3),
    ]
    np.testing.assert_allclose(our_logits(model, plan.resolve(model), trainable, values, tokens), expected, atol=1e-4)


def test_names_of_older_releases_and_of_a_text_model_are_read(checkpoint, random_trainable, tokens, tmp_path):
    model = load_model(checkpoint("gemma3"), dtype="float32")
    plan, trainable = fixed(rules_for("gemma3", False), model, random_trainable)
    expected = our_logits(model, plan, trainable, {}, tokens)
    save_adapter(tmp_path / "new", plan, trainable, {}, model, "a/base")
    for body, head in (("language_model.model.", "language_model."), ("model.", "")):
        directory = tmp_path / body
        directory.mkdir()

        def renamed(name, body=body, head=head):
            return name.replace("model.language_model.", body).replace("lm_head", f"{head}lm_head")

        tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
        save_file({renamed(name): value for name, value in tensors.items()}, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(renamed((tmp_path / "new" / "adapter_config.json").read_text()))
        again, arrays, values = load_adapter(directory, model)
        np.testing.assert_allclose(our_logits(model, again.resolve(model), arrays, values, tokens), expected, atol=1e-5)


def test_names_are_those_of_the_base_that_is_named(
    checkpoint, random_trainable, tokens, torch_logits, tmp_path, monkeypatch
):
    """A model of several parts, saved, is a text model: an adapter for that one has its names."""
    model = load_model(checkpoint("gemma3"), dtype="float32")
    save_model(model, tmp_path / "text")
    plan, trainable = fixed(rules_for("gemma3", False), model, random_trainable)
    save_adapter(tmp_path / "adapter", plan, trainable, {}, model, str(tmp_path / "text"))
    theirs = torch_logits(peft_model(tmp_path / "adapter", plan), tokens)
    np.testing.assert_allclose(theirs, our_logits(model, plan, trainable, {}, tokens), atol=1e-4)
    # As a shell would read it, which peft does not.
    monkeypatch.setenv("HOME", str(tmp_path))
    save_adapter(tmp_path / "home", plan, trainable, {}, model, "~/text")
    values = json.loads((tmp_path / "home" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tmp_path / "text")
    with pytest.raises(UserError, match="holds a model of the family llama; the adapter's is gemma3_text"):
        save_adapter(tmp_path / "other", plan, trainable, {}, model, str(checkpoint("llama")))


def test_an_adapter_is_read_onto_a_mesh(checkpoint, random_trainable, tokens, mesh, tmp_path):
    model = load_model(checkpoint("llama"), dtype="float32")
    plan, trainable = fixed(rules_for("llama", False), model, random_trainable)
    save_adapter(tmp_path, plan, trainable, {}, model, "base")
    sharded = load_model(checkpoint("llama"), mesh, dtype="float32")
    again, arrays, values = load_adapter(tmp_path, sharded)
    assert arrays["low_rank"]["layers.mlp.up"]["a"].sharding.spec == jax.P(None, "fsdp", None)
    ours = our_logits(model, plan, trainable, {}, tokens)
    np.testing.assert_allclose(our_logits(sharded, again.resolve(sharded), arrays, values, tokens), ours, atol=1e-4)


def test_what_an_adapter_cannot_hold(checkpoint, random_trainable, tmp_path):
    model = load_model(checkpoint("llama"), dtype="float32")
    whole = [FullRule(match="final_norm"), FullRule(match="layers.0.mlp.up")]
    rules = [LowRankRule(match="**.q", rank=4)]
    plan, trainable = fixed(whole, model, random_trainable)
    assert not plan.exports
    with pytest.raises(UserError, match=r"cannot hold layers.mlp.up.kernel, final_norm.scale.*export --merged"):
        save_adapter(tmp_path, plan, trainable, {}, model, "base")
    assert not list(tmp_path.iterdir())
    # Neither a bias of a layer that has an adapter other than LoRA, nor a table that PEFT would not give to the head.
    for adapted, match, told in (
        ([Ia3Rule(match="**.q")], "layers.1.attention.q.bias", "attention.q.bias"),
        (rules, "embed", "embed"),
    ):
        tied = load_model(checkpoint("qwen2"), dtype="float32")
        plan, trainable = fixed([FullRule(match=match), *adapted], tied, random_trainable)
        with pytest.raises(UserError, match=rf"cannot hold \S*{told}.* method full: it takes"):
            save_adapter(tmp_path, plan, trainable, {}, tied, "base")
    plan, trainable = fixed(rules, model, random_trainable)
    with pytest.raises(UserError, match=r"update.0.rank: 5 is not between 1 and the capacity 4"):
        save_adapter(tmp_path, plan, trainable, {"update.0.rank": 5.0}, model, "base")


def test_modules_that_were_trained_themselves_stand_beside_an_adapter(
    checkpoint, random_trainable, tokens, torch_logits, tmp_path
):
    directory = checkpoint("llama")
    model = load_model(directory, dtype="float32")
    rules = [
        LowRankRule(match="layers.*.attention.{q,v}", rank=4),
        *(FullRule(match=match) for match in ("layers.{0,2}.mlp.up", "layers.1.mlp_norm", "final_norm")),
        *(FullRule(match=match) for match in ("embed", "lm_head")),
    ]
    plan, trainable = fixed(rules, model, random_trainable)
    save_adapter(tmp_path, plan, trainable, {}, model, str(directory))
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["target_modules"] == ["q_proj", "v_proj"]
    assert told["modules_to_save"] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.post_attention_layernorm",
        "model.layers.2.mlp.up_proj",
        "model.norm",
    ]
    ours = our_logits(model, plan, trainable, {}, tokens)
    read, arrays, values = load_adapter(tmp_path, model)
    assert sorted(rule.match for rule in read.rules if isinstance(rule, FullRule)) == [
        "embed.table",
        "final_norm.scale",
        "layers.1.mlp_norm.scale",
        "layers.{0,2}.mlp.up.kernel",
        "lm_head.kernel",
    ]
    jax.tree.map(np.testing.assert_array_equal, arrays, trainable)
    np.testing.assert_allclose(our_logits(model, read.resolve(model), arrays, values, tokens), ours, atol=1e-5)
    theirs = peft_model(tmp_path, UpdatePlan(rules[:1]).resolve(model))
    np.testing.assert_allclose(torch_logits(theirs, tokens), ours, rtol=1e-4, atol=1e-4)
    # As PEFT writes it, by the ends of names: of a linear layer its bias too, where it has one.
    theirs.save_pretrained(tmp_path / "theirs")
    again, arrays, values = load_adapter(tmp_path / "theirs", model)
    np.testing.assert_allclose(our_logits(model, again.resolve(model), arrays, values, tokens), ours, atol=1e-5)

    def told_wrong(**changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**told, **changes}))
        with pytest.raises(UserError) as error:
            load_adapter(tmp_path, model)
        return str(error.value)

    assert "modules_to_save: the model has no score" in told_wrong(modules_to_save=[*told["modules_to_save"], "score"])
    assert "layers.1.mlp.up_proj is in modules_to_save but has no" in told_wrong(modules_to_save=["up_proj"])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_embeddings_of_some_tokens_stand_beside_an_adapter(
    family, checkpoint, random_trainable, tokens, torch_logits, tmp_path
):
    directory = checkpoint(family)
    model = load_model(directory, dtype="float32")
    chosen = [int(token) for token in (tokens[0, 3], tokens[1, 5], 60)]
    rules = [LowRankRule(match="layers.*.attention.v", rank=4), TrainableTokensRule(match="embed", tokens=chosen)]
    plan, trainable = fixed(rules, model, random_trainable)
    start = np.asarray(plan.init(jax.random.key(0), split(model)[1])["trainable_tokens"]["embed.table"])
    np.testing.assert_array_equal(start, split(model)[1]["embed.table"][np.array(chosen)])
    save_adapter(tmp_path, plan, trainable, {}, model, str(directory))
    ours = our_logits(model, plan, trainable, {}, tokens)
    # A tied head has them too.
    differs = ours - our_logits(model, plan, {**trainable, "trainable_tokens": {"embed.table": start}}, {}, tokens)
    assert np.all(np.abs(differs[1, 6:]).max(axis=-1) > 0.0)
    read, arrays, values = load_adapter(tmp_path, model)
    assert read.rules[-1].tokens == chosen
    np.testing.assert_array_equal(
        arrays["trainable_tokens"]["embed.table"], trainable["trainable_tokens"]["embed.table"]
    )
    np.testing.assert_allclose(our_logits(model, read.resolve(model), arrays, values, tokens), ours, atol=1e-5)
    theirs = peft_model(tmp_path, UpdatePlan(rules[:1]).resolve(model))
    np.testing.assert_allclose(torch_logits(theirs, tokens), ours, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again, arrays, values = load_adapter(tmp_path / "theirs", model)
    np.testing.assert_allclose(our_logits(model, again.resolve(model), arrays, values, tokens), ours, atol=1e-5)


@pytest.mark.parametrize(("ids", "told"), [([60, 61], r"not \[61\]"), ([3, 4, 3], "a token is twice")])
def test_tokens_are_those_of_the_model(ids, told, config):
    with pytest.raises(UserError, match=rf"update\.0\.tokens: .*{told}"):
        UpdatePlan([TrainableTokensRule(match="embed", tokens=ids)]).resolve(config)


def test_merging_places_what_was_trained_in_full(checkpoint, random_trainable, tokens):
    model = load_model(checkpoint("llama"), dtype="float32")
    rules = [LowRankRule(match="**.q", rank=4), FullRule(match="final_norm"), FullRule(match="layers.0.mlp.up")]
    plan, trainable = fixed(rules, model, random_trainable)
    merged = merge_adapters(model, plan, trainable, {})
    np.testing.assert_allclose(
        np.asarray(merged(tokens)), our_logits(model, plan, trainable, {}, tokens), atol=2e-5, rtol=1e-5
    )
    before, after = split(model)[1], split(merged)[1]
    assert [path for path in before if not np.array_equal(before[path], after[path])] == [
        "layers.attention.q.kernel",
        "layers.mlp.up.kernel",
        "final_norm.scale",
    ]


def test_an_adapter_of_a_packaged_model_loads_with_its_base_also_where_it_was_moved(
    random_trainable, torch_logits, tmp_path, monkeypatch
):
    peft = pytest.importorskip("peft")
    import transformers

    monkeypatch.chdir(tmp_path)
    model = load_model("jaxtune:nano", dtype="float32")
    plan, trainable = fixed([LowRankRule(match="layers.0.attention.{q,v}", rank=4)], model, random_trainable)
    save_adapter("made", plan, trainable, {}, model, "jaxtune:nano")
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    ours = our_logits(model, plan, trainable, {}, tokens)
    # A name that only one working directory gives a meaning to would do here, and nowhere else.
    monkeypatch.chdir("/")
    whole = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    np.testing.assert_allclose(torch_logits(whole, tokens), ours, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "made" / "base")
    assert tokenizer("size: 12")["input_ids"] == load_tokenizer("jaxtune:nano")("size: 12")["input_ids"]
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    text = (moved / "README.md").read_text()
    assert "base_model: jaxtune:nano" in text
    assert "THIS_FOLDER/base" in text
    before = (moved / "adapter_config.json").read_bytes()
    base = transformers.AutoModelForCausalLM.from_pretrained(moved / "base")
    theirs = torch_logits(peft.PeftModel.from_pretrained(base, moved).eval(), tokens)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    follow_base(moved)
    assert json.loads((moved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved / "base")
    # Nothing else of it has changed, and where the base is where it says, nothing at all.
    after = (moved / "adapter_config.json").read_bytes()
    assert after == before.replace(str(tmp_path / "made").encode(), str(moved).encode())
    follow_base(moved)
    assert (moved / "adapter_config.json").read_bytes() == after


def test_a_base_that_was_named_from_the_working_directory_is_found_from_any(
    checkpoint, random_trainable, tmp_path, monkeypatch
):
    directory = checkpoint("llama")
    model = load_model(directory, dtype="float32")
    plan, trainable = fixed([LowRankRule(match="layers.0.attention.q", rank=4)], model, random_trainable)
    monkeypatch.chdir(directory.parent)
    for base, named in ((directory.name, str(directory)), ("some/hub-id", "some/hub-id")):
        save_adapter(tmp_path, plan, trainable, {}, model, base)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == named
        assert not (tmp_path / "base").exists()
