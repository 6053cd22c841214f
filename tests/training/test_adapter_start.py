"""Training that starts from an adapter, against peft and torch."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtune.config import load_config, with_overrides
from jaxtune.errors import UserError
from jaxtune.models import load_model, save_model
from jaxtune.models.decoder import merge, split
from jaxtune.search.checks import check_space
from jaxtune.search.run import search
from jaxtune.training import Trainer
from jaxtune.training.adapter_start import with_adapter
from jaxtune.training.model_directory import model_directory
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.run import train
from jaxtune.updates import UpdatePlan, load_adapter
from jaxtune.updates.peft.base import check_base, named_base


@pytest.fixture(scope="module")
def theirs(tiny_model, tmp_path_factory):
    """An adapter as peft writes it, with two ranks, that changes what the model answers."""
    directory = tmp_path_factory.mktemp("theirs") / "adapter"
    directory.mkdir()
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tiny_model),
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 6},
        "lora_dropout": 0.0,
    }
    (directory / "adapter_config.json").write_text(json.dumps(values))
    draw, tensors = np.random.default_rng(0), {}
    for layer in range(2):
        for module, inputs, outputs in (
            ("self_attn.q_proj", 32, 32),
            ("self_attn.v_proj", 32, 16),
            ("mlp.down_proj", 48, 32),
        ):
            rank = 6 if (layer, module) == (1, "self_attn.q_proj") else 3
            name = f"base_model.model.model.layers.{layer}.{module}"
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                tensors[f"{name}.lora_{part}.weight"] = draw.normal(0, 0.3, shape).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture
def config(config_file, theirs):
    """A run of two steps from the adapter; it says nothing of update."""
    lines = config_file.read_text().splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if line.startswith("update:"))
    config_file.write_text("".join(lines[:start] + lines[start + 2 :]))
    short = ["train.steps=2", "data.test=null", "optimizer.learning_rate=1e-2"]
    return load_config(config_file, [f"model.adapter={theirs}", *short])


def torch_logits(adapter, base, tokens):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.slow
def test_training_starts_from_what_peft_computes_and_its_adapter_loads_there(config, theirs, tiny_model, tmp_path):
    batch = OpenedConfig(config, parts=("validation",)).validation_batches[0]
    tokens = np.where(batch["segment_ids"] >= 0, batch["tokens"], 0)
    opened = OpenedConfig(config)
    trainer, (static, _) = opened.trainer(), split(opened.model)

    def loss(logits):
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        picked = np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]
        return -np.average(picked, weights=batch["weights"])

    expected = loss(torch_logits(theirs, tiny_model, tokens))
    plain = loss(np.asarray(opened.model(tokens)))
    assert abs(expected - plain) > 0.01
    assert trainer.evaluate(trainer.init(), [batch]).loss == pytest.approx(expected, rel=1e-5)
    summary = train(config)
    # A second one starts from the same arrays: the first one's steps have not taken them.
    again = trainer.init()
    stepped, _ = trainer.step(again, next(opened.batches()))
    assert trainer.evaluate(trainer.init(), [batch]).loss == pytest.approx(expected, rel=1e-5)
    assert int(stepped.step) == 1

    trained = load_adapter(summary["adapter"]["path"], opened.model)
    plan = trained[0].resolve(opened.model)

    @jax.jit
    def ours(params, trainable):
        changed, adapters = plan.apply(params, trainable, trained[2])
        return merge(static, changed)(tokens, adapters=adapters)

    after = torch_logits(summary["adapter"]["path"], tiny_model, tokens)
    np.testing.assert_allclose(np.asarray(ours(trainer.params, trained[1])), after, atol=1e-4)
    assert loss(after) < expected
    # So a run's own adapter is a start as well.
    chained = OpenedConfig(with_overrides(config, {"model.adapter": summary["adapter"]["path"]}), parts=()).trainer()
    assert chained.evaluate(chained.init(), [batch]).loss == pytest.approx(loss(after), rel=1e-5)
    # What it trained is recorded, and the same command finds it finished.
    recorded = load_config(tmp_path / "run" / "config.yaml")
    assert recorded.model.adapter == str(theirs)
    assert {(rule.rank, rule.alpha) for rule in recorded.update} == {(3, 5.0), (6, 5.0)}
    assert train(config) == train(recorded) == summary


SPACE = {"optimizer.learning_rate": {"log_uniform": [1e-4, 1e-2]}}


@pytest.mark.parametrize("key", ["update.0.rank", "update.1.alpha", "update.0.match"])
def test_what_the_adapter_settles_is_not_searched(config, key):
    searched = with_overrides(config, {"search": {"space": {**SPACE, key: {"choice": [1, 2]}}}})
    with pytest.raises(UserError, match=rf"search\.space: '{key}' is settled by model\.adapter.*only dropout"):
        search(searched)


def test_references_and_spaces_of_a_study_from_an_adapter(config):
    space = {**SPACE, "update.1.dropout": {"uniform": [0.0, 0.2]}}
    settled = with_adapter(with_overrides(config, {"search": {"space": space}}))
    check_space(settled)
    for reference in ("paper", {"update.0.rank": 4}):
        with pytest.raises(UserError, match=r"search\.reference: 'update\.0\.rank' is settled by model\.adapter"):
            check_space(with_overrides(settled, {"search.reference": reference}))


def test_given_rules_may_say_how_the_adapter_s_modules_move_and_nothing_else(config):
    rules = [rule.model_dump() for rule in with_adapter(config).update]
    moved = [{**rule, "dropout": 0.2, "learning_rate_scale": 0.5} for rule in rules]
    full = {"match": "layers.*.mlp_norm", "method": "full"}
    given = with_overrides(config, {"update": [*moved, full]})
    assert with_adapter(given) == given
    other = with_overrides(config, {"update": [{"match": "layers.*.attention.q", "method": "low_rank", "rank": 2}]})
    with pytest.raises(UserError) as error:
        with_adapter(other)
    assert "update: model.adapter settles modules, ranks and alphas" in str(error.value)
    assert "layers.0.attention.q: rank 3 with scale 1.66667 there, rank 2 with scale 16 here" in str(error.value)
    assert "and 2 more" in str(error.value)


def test_adapters_of_another_model_are_refused(config, theirs, tiny_model, tmp_path):
    # The same weights in another place are the same model, others of the same shapes are not.
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    same = with_overrides(config, {"model.path": str(copy)})
    assert with_adapter(same).update
    model = load_model(tiny_model, dtype="float32")
    static, params = split(model)
    params = {**params, "layers.attention.q.kernel": params["layers.attention.q.kernel"] * 1.01}
    save_model(merge(static, params), tmp_path / "other", tokenizer_from=tiny_model)
    with pytest.raises(UserError, match=rf"model\.adapter: {theirs} was trained on {tiny_model}, and model\.path is"):
        train(with_overrides(config, {"model.path": str(tmp_path / "other")}))
    with pytest.raises(UserError, match=r"model\.adapter: .*the adapter does not fit the model: .*has shape"):
        with_adapter(with_overrides(config, {"model.path": "jaxtune:nano"}))
    with pytest.raises(UserError, match=r"model\.adapter: .*there is no such adapter directory"):
        with_adapter(with_overrides(config, {"model.adapter": str(tmp_path / "none")}))
    with pytest.raises(UserError, match=r"model\.adapter: an adapter was trained on pretrained weights"):
        with_overrides(config, {"model.initialize": "random"})


@pytest.mark.parametrize(
    ("base", "at", "path", "revision", "fits"),
    [
        ("org/model", None, "Org/Model", None, True),
        ("org/model", None, "org/another", None, False),
        ("org/model", "v1", "org/model", "v2", False),
        ("org/model", "v1", "org/model", None, True),
        ("org/model", None, "{here}", None, True),
        ("/gone/model", None, "{here}", None, True),
        (None, None, "org/another", None, True),
        ("jaxtune:nano", None, "jaxtune:nano", None, True),
        ("/gone/base", None, "jaxtune:nano", None, True),
        ("/gone/base", None, "{here}", None, False),
    ],
)
def test_a_base_is_compared_by_name_where_its_files_are_not_at_hand(
    theirs, tiny_model, tmp_path, base, at, path, revision, fits
):
    directory = shutil.copytree(theirs, tmp_path / "adapter")
    values = json.loads((directory / "adapter_config.json").read_text())
    values |= {"base_model_name_or_path": base, "revision": at}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    if base == "/gone/base":  # moved with the adapter
        named_base("jaxtune:nano", directory)
    place = tiny_model if path == "{here}" else named_base("jaxtune:nano", tmp_path)
    model = type(tiny_model)(place)
    arguments = (directory, path.format(here=tiny_model), revision, model)
    if fits:
        check_base(*arguments)
    else:
        with pytest.raises(UserError, match=r"was trained on .*, another model; set model\.path to that one"):
            check_base(*arguments)


def test_a_start_of_other_shapes_is_told(trainer, model):
    plan = UpdatePlan(trainer.plan.rules)
    start = trainer.init().trainable
    other = {"low_rank": {path: {"a": each["a"][..., :2], "b": each["b"]} for path, each in start["low_rank"].items()}}
    with pytest.raises(
        ValueError, match=r"start: an array has the shape \(2, 32, 2\), where the plan has \(2, 32, 4\)"
    ):
        Trainer(model, plan, trainer.config, start={**start, **other}).init()


@pytest.mark.parametrize(("path", "folders"), [("jaxtune:nana", False), ("/gone/model", False), ("./gone", True)])
def test_only_a_relative_path_is_told_to_have_been_looked_for(config_file, tmp_path, path, folders):
    with pytest.raises(UserError) as error:
        model_directory(load_config(config_file, [f"paths_from=[{tmp_path}]", f"model.path={path}"]))
    assert str(error.value).startswith("model.path: there is no ")
    assert ("as paths_from says" in str(error.value)) == folders
