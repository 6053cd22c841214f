"""Merging adapters: against peft, against closed forms in NumPy, and every mismatch in one message."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.errors import UserError
from jaxtune.updates.combine import METHODS, combine_adapters

SIZES = {"first.q_proj": (10, 7), "second.q_proj": (10, 7), "second.up_proj": (7, 12)}


def write(
    directory: Path, seed: int, rank: int = 4, alpha: float = 6, modules: Sequence[str] = (), **config: Any
) -> Path:
    """A random adapter in PEFT's format."""
    generator, tensors = np.random.default_rng(seed), {}
    for module in modules or SIZES:
        inputs, outputs = SIZES[module]
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = generator.standard_normal(shape).astype(
                np.float32
            )
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    told = {
        "peft_type": "LORA", "base_model_name_or_path": "base", "r": rank, "lora_alpha": alpha,
        "target_modules": sorted(modules or SIZES), **config,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(told))
    return directory


def changes(directory: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to each matrix, in float64."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = config.get("rank_pattern", {}).get(module, config["r"])
        alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
        assert len(a) == rank
        scale = alpha / np.sqrt(rank) if config.get("use_rslora") else alpha / rank
        b = tensors[name.replace("lora_A", "lora_B")]
        found[module] = scale * b.astype(np.float64) @ a.astype(np.float64)
    return found


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of one rank, the second rank-stabilised, the third on two modules alone."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write(folder / "a", 1),
        write(folder / "b", 2, alpha=3, use_rslora=True),
        write(folder / "c", 3, modules=("first.q_proj", "second.up_proj")),
    ]


WEIGHTS = [0.7, -0.4, 1.3]


def test_peft_merges_alike(adapters: list[Path], tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    def layer(*names: str) -> Any:
        return torch.nn.ModuleDict({name: torch.nn.Linear(*SIZES[f"second.{name}"], bias=False) for name in names})

    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer("q_proj"), layer("q_proj", "up_proj")

    model = peft.PeftModel.from_pretrained(Base(), adapters[0], "0")
    for place in (1, 2):
        model.load_adapter(adapters[place], str(place))
    # What its draws come to has no counterpart; at density 1 nothing is drawn.
    cases = [(method, 1.0 if method.startswith("dare") else 0.45, "total") for method in METHODS]
    for method, density, sign in [*cases, ("ties", 0.45, "frequency")]:
        prunes = method not in ("cat", "svd", "linear")
        ours = tmp_path / f"{method}-{sign}"
        combine_adapters(
            adapters, ours, method=method, weights=WEIGHTS, density=density if prunes else None, majority_sign=sign
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # at density 1 it says that it prunes nothing
            model.add_weighted_adapter(
                ["0", "1", "2"], WEIGHTS, ours.name, method, density=density, majority_sign_method=sign
            )
        for module, expected in changes(ours).items():
            theirs = model.get_submodule(f"base_model.model.{module}").get_delta_weight(ours.name)
            np.testing.assert_allclose(expected, theirs.detach().numpy(), atol=2e-5, err_msg=f"{method} of {module}")
    # What was written is what peft reads.
    model.load_adapter(tmp_path / "cat-total", "again")
    for module, expected in changes(tmp_path / "cat-total").items():
        read = model.get_submodule(f"base_model.model.{module}").get_delta_weight("again")
        np.testing.assert_allclose(expected, read.detach().numpy(), atol=2e-5)


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.permutations([0, 1, 2]), st.integers(1, 7))
@settings(max_examples=15, deadline=None)
def test_cat_is_the_weighted_sum_and_svd_its_best_approximation(
    adapters, tmp_path_factory, weights, order, rank
) -> None:
    """In any order: where the first adapter is rank-stabilised, too."""
    folder = tmp_path_factory.mktemp("merged")
    chosen = [adapters[place] for place in order]
    combine_adapters(chosen, folder / "cat", method="cat", weights=weights)
    combine_adapters(chosen, folder / "svd", weights=weights, rank=rank)
    found, cut = changes(folder / "cat"), changes(folder / "svd")
    assert set(found) == set(SIZES)
    for module in SIZES:
        terms = [
            weight * of[module] for one, weight in zip(chosen, weights, strict=True) if module in (of := changes(one))
        ]
        np.testing.assert_allclose(found[module], sum(terms), atol=1e-5)
        u, s, v = np.linalg.svd(sum(terms))
        np.testing.assert_allclose(cut[module], (u[:, :rank] * s[:rank]) @ v[:rank], atol=2e-5)


def test_dare_keeps_the_mean_and_repeats_by_its_seed(adapters: list[Path], tmp_path: Path) -> None:
    def merged(seed: int, name: str = "dare") -> dict[str, np.ndarray]:
        combine_adapters(
            adapters[:2], tmp_path / name, method="dare_linear_svd", weights=WEIGHTS[:2], density=0.5, rank=7, seed=seed
        )
        return changes(tmp_path / name)

    first, again = merged(1), merged(1, "again")
    combine_adapters(adapters[:2], tmp_path / "sum", method="cat", weights=WEIGHTS[:2])
    exact, draws = changes(tmp_path / "sum"), [merged(seed) for seed in range(80)]
    for module, expected in exact.items():
        np.testing.assert_array_equal(first[module], again[module])
        of = np.stack([one[module] for one in draws])
        # A number x is 2x or 0: its deviation is |x|; of the sum that of its terms.
        deviation = np.sqrt(sum((w * changes(one)[module]) ** 2 for w, one in zip(WEIGHTS, adapters[:2], strict=False)))
        np.testing.assert_allclose(of.std(axis=0), deviation, rtol=0.35, atol=1e-3)
        assert np.abs(of.mean(axis=0) - expected).max() < 5 * deviation.max() / np.sqrt(len(draws))
    # Modules of one shape are drawn apart.
    zero = [first[module] == 0 for module in ("first.q_proj", "second.q_proj")]
    assert not np.array_equal(*zero) or not zero[0].any()


def test_all_mismatches_are_in_one_message(adapters: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other", 5, rank=2, base_model_name_or_path="another", revision="v1")
    wide = tmp_path / "wide"
    write(wide, 6)
    tensors = load_file(wide / "adapter_model.safetensors")
    tensors["base_model.model.first.q_proj.lora_A.weight"] = np.zeros((4, 11), np.float32)
    save_file(tensors, wide / "adapter_model.safetensors")
    with pytest.raises(UserError) as error:
        jaxtune.combine_adapters([adapters[0], other, wide], tmp_path / "out", method="ties", weights=[1.0, 2.0])
    message = str(error.value)
    for part in (
        "there are 2 weights for 3 adapters", "ties needs a density",
        f"base_model_name_or_path is 'base' in {adapters[0]} and 'another' in {other}", "revision is None",
        "first.q_proj is of different sizes (10 × 7, 10 × 7, 11 × 7)",
        "second.up_proj has ranks 4, 2, 4, and ties needs equal ones (cat and svd do not)",
    ):  # fmt: skip
        assert part in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()
    dora = write(tmp_path / "dora", 7, use_dora=True)
    with pytest.raises(UserError, match="its kind is DoRA"):
        combine_adapters([adapters[0], dora], tmp_path / "out")
    with pytest.raises(UserError, match="no such adapter directory"):
        combine_adapters([adapters[0], tmp_path / "none"], tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tie"}, "no method 'tie'; did you mean 'ties'"),
        ({"method": "ties", "density": 1.5}, r"density 1\.5 is not above 0 and up to 1"),
        ({"method": "cat", "density": 0.5}, "cat prunes nothing"),
        ({"method": "linear", "rank": 3}, "the rank of linear follows"),
        ({"weights": [1.0, float("nan")]}, "not a finite number"),
        ({"majority_sign": "most"}, "'most', not total or frequency"),
    ],
)
def test_wrong_arguments_are_named(
    adapters: list[Path], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        combine_adapters(adapters[:2], tmp_path / "out", **arguments)
    with pytest.raises(UserError, match="two or more"):
        combine_adapters(adapters[:1], tmp_path / "out")
