"""The decoder against transformers (torch, float32, eager attention), and files passed both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors import safe_open

from jaxtune.models.loading import load_model
from jaxtune.models.saving import save_model
from jaxtune.models.tokenizer import load_tokenizer

Checkpoint = Callable[[str], tuple[Any, Path]]
LENGTH = 40  # longer than the windows of 8


def tokens(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (2, LENGTH)).astype(np.int32)


def torch_logits(model: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        return model(torch.from_numpy(tokens(model.config.vocab_size)).long()).logits.numpy()


def tensors(directory: Path) -> dict[str, np.ndarray]:
    with safe_open(directory / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping


def test_logits_equal_transformers(case: str, checkpoint: Checkpoint, record_property: Callable[..., None]) -> None:
    reference, directory = checkpoint(case)
    expected = torch_logits(reference)
    ours = np.asarray(load_model(directory)(tokens(reference.config.vocab_size)))
    difference = float(np.abs(ours - expected).max())
    record_property("difference", difference)
    print(f"{case}: largest difference {difference:.2e}, largest logit {np.abs(expected).max():.1f}")
    assert np.abs(expected).max() > 1  # else the tolerance would mean nothing
    assert difference < 2e-4


def test_saved_file_loads_in_transformers_and_nothing_is_lost(
    case: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    reference, directory = checkpoint(case)
    save_model(load_model(directory), tmp_path)

    before, after = tensors(directory), tensors(tmp_path)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert value.tobytes() == after[name].tobytes(), name

    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(torch_logits(again.eval()), torch_logits(reference))
    ours, theirs = again.config.to_dict(), reference.config.to_dict()
    differing = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    # Which window no layer has, and where windows would begin, change nothing; the rest is about the file.
    assert differing <= {"_name_or_path", "architectures", "dtype", "sliding_window", "max_window_layers"} | {
        "_attn_implementation",
        "head_dim",
    }
    if any(window is not None for window in load_model(tmp_path).config.windows):
        assert ours["sliding_window"] == theirs["sliding_window"]


def test_logits_do_not_depend_on_the_mesh(checkpoint: Checkpoint, mesh: Mesh) -> None:
    reference, directory = checkpoint("gemma3")
    ours = np.asarray(load_model(directory, mesh)(tokens(reference.config.vocab_size)))
    np.testing.assert_allclose(ours, torch_logits(reference), atol=2e-4)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_checkpoint(checkpoint: Checkpoint, tmp_path: Path, prefix: str) -> None:
    from safetensors.numpy import save_file

    reference, directory = checkpoint("gemma3")
    text = json.loads((directory / "config.json").read_text())
    ends = text.pop("eos_token_id")
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 4},
        "eos_token_id": ends,
        "mm_tokens_per_image": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(outer))
    held = {name.replace("model.", prefix, 1): value for name, value in tensors(directory).items()}
    held["vision_tower.encoder.weight"] = np.ones((2, 2), np.float32)
    held["multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(2, np.float32)
    save_file(held, tmp_path / "model.safetensors")

    model = load_model(tmp_path)
    assert model.config.family == "gemma3_text"
    assert model.config.eos_token_ids == (2, 5)
    ours = np.asarray(model(tokens(reference.config.vocab_size)))
    np.testing.assert_allclose(ours, torch_logits(reference), atol=2e-4)


def test_pretrained_loss_and_greedy_text(babyllama: Path) -> None:
    """The figures of the checkpoint's README, measured there with transformers."""
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big red ball. She wanted to play with it."
    )
    continuation = (
        ", there was a little girl named Lily. She loved to play outside in the sunshine. "
        "One day, she went to the park with her "
    )
    tokenizer, model = load_tokenizer(babyllama), load_model(babyllama)
    ids = np.array([tokenizer(text)["input_ids"]], np.int32)
    assert ids[0, 0] == model.config.bos_token_id

    # Padded on the right to one length, so that everything below is one program; nothing looks ahead.
    buffer = np.zeros((1, 192), np.int32)
    buffer[0, : ids.shape[1]] = ids[0]
    logits = np.asarray(model(buffer))[0, : ids.shape[1] - 1]
    scores = logits - np.asarray(jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    loss = -np.take_along_axis(scores, ids[0, 1:, None], axis=-1).mean()
    assert abs(loss - 0.1448) < 0.0005

    prompt = tokenizer("Once upon a time")["input_ids"]
    buffer[:] = 0
    buffer[0, : len(prompt)] = prompt
    wanted = len(tokenizer("Once upon a time" + continuation)["input_ids"])
    for end in range(len(prompt), wanted):
        buffer[0, end] = np.asarray(model(buffer))[0, end - 1].argmax()
    assert tokenizer.decode(buffer[0, 1:wanted].tolist()) == "Once upon a time" + continuation
