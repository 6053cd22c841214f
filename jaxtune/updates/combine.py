"""Merges several PEFT adapters of one base into one, by the methods of PEFT's ``add_weighted_adapter``.

An adapter i changes a matrix by ``sᵢ Bᵢ Aᵢ`` (B (out, r), A (r, in)); ``wᵢ`` is its weight.

===================  ==================================================================================================
method               the merged term
===================  ==================================================================================================
``cat``              ``[B₁ B₂ …] [w₁s₁A₁; w₂s₂A₂; …]``: the weighted sum itself, at the sum of the ranks
``svd``              the weighted sum cut to its largest singular values (by default as many as the largest rank)
``linear``           ``Σ √|wᵢsᵢ| Bᵢ · Σ sign(wᵢsᵢ) √|wᵢsᵢ| Aᵢ``: of equal ranks, and *not* the weighted sum
``ties``             of each the largest ``⌊density n⌋`` numbers; where they disagree in sign, only those with the sign
                     of their sum count, as a mean (Yadav et al. 2023, arXiv:2306.01708)
``dare_linear``      a random share ``density`` of each, divided by the density, and then the sum
                     (Yu et al. 2023, arXiv:2311.03099)
``dare_ties``        the same, and then the signs of TIES
``magnitude_prune``  of each the largest ``⌊density n⌋`` numbers, and then the sum
===================  ==================================================================================================

The last four act on A and B apart, weighted as in ``linear``; with ``_svd`` behind their names they act on the changes
``sᵢ Bᵢ Aᵢ`` themselves, which are then cut as in ``svd``. A matrix that only some adapters change is merged of those.

What is written is scaled by 1. (PEFT 0.21 copies the first adapter's ``use_rslora``, which scales the result by the
root of its rank, and drops trained DoRA magnitudes without a word; adapters with such are refused here.)
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from jaxtune.errors import UserError, nearest
from jaxtune.models.tensor_files import DTYPES, TensorEntry, read_header
from jaxtune.updates.peft.files import write_adapter
from jaxtune.updates.peft.format import LORA, AdapterConfig, adapter_files, tensor_name
from jaxtune.updates.peft.load import read_adapter_values

Sign = Literal["total", "frequency"]
Array = Float[np.ndarray, "..."]

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("cat", "svd", "linear", *_PRUNING, *(f"{name}_svd" for name in _PRUNING))
"""Names of the methods, as PEFT has them."""

_README = """---
base_model: {base}
library_name: peft
tags:
- lora
- jaxtune
---

A LoRA adapter for `{base}`, merged of {count} others with method `{method}`; load it with
`peft.PeftModel.from_pretrained`.
"""
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# So many mismatches are listed; the others are counted.
_LISTED = 12


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """An adapter's files, read: of each module A and B, which lie in the file, and its scale."""

    directory: Path
    config: AdapterConfig
    tensors: Mapping[str, tuple[TensorEntry, TensorEntry]]

    def factors(self, module: str) -> tuple[Float[np.ndarray, "rank inputs"], Float[np.ndarray, "outputs rank"]]:
        a, b = self.tensors[module]
        return a.read().astype(np.float64), b.read().astype(np.float64)

    def scale(self, module: str) -> float:
        rank, alpha = self.config.rank(module), self.config.alpha(module)
        return alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank


def combine_adapters(
    adapters: Sequence[str | Path],
    target: str | Path,
    *,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    majority_sign: str = "total",
    seed: int = 0,
) -> None:
    """Merges PEFT adapters of one base into one, and writes it as a PEFT directory.

    Args:
      adapters: directories with ``adapter_config.json`` and ``adapter_model.safetensors``, two or more.
      target: directory to write; made if it does not exist.
      method: one of :data:`METHODS`.
      weights: of the adapters, negative ones too; 1 each if None.
      density: share of the numbers that is kept, above 0 and up to 1; methods that prune need it.
      rank: of what ``svd`` and the ``_svd`` methods write; if None, the largest of the adapters.
      majority_sign: of TIES: ``total``, the sign of the sum, or ``frequency``, the one that more adapters have; + where
        it is 0.
      seed: of what DARE draws, which follows from it and the module's name alone.

    Raises:
      UserError: an adapter cannot be read or is no plain LoRA; adapters differ in base, shapes or, for methods that act
        on A and B, ranks; or an argument does not go with the method. All mismatches are in one message.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    problems = _check_arguments(adapters, method, weights, density, rank, majority_sign)
    read = [found for found in (_read(Path(one), problems) for one in adapters) if found is not None]
    modules = sorted({module for one in read for module in one.tensors})
    if len(read) == len(adapters):
        problems += _mismatches(read, modules, method)
    if problems:
        more = len(problems) - _LISTED
        told = [*problems[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
        raise UserError("adapters cannot be merged: " + "; ".join(told))
    pruned = _pruning(method, 1.0 if density is None else density, majority_sign)
    # No term has more than the ranks that went into it.
    largest = rank or max(one.config.rank(module) for one in read for module in one.tensors)
    merged = {}
    for module in modules:
        terms = [(one, weight) for one, weight in zip(read, weights, strict=True) if module in one.tensors]
        merged[module] = _merged(terms, module, method, pruned, largest, seed)
    _write(Path(target), read, merged, method)


def _merged(
    terms: Sequence[tuple[_Adapter, float]],
    module: str,
    method: str,
    pruned: Callable[[Sequence[Array], Sequence[float], Sequence[np.random.Generator]], Array],
    largest: int,
    seed: int,
) -> tuple[Float[np.ndarray, "rank inputs"], Float[np.ndarray, "outputs rank"]]:
    """A and B of one module, at a scale of 1."""
    factors = [one.factors(module) for one, _ in terms]
    weighted = [weight * one.scale(module) for one, weight in terms]

    def draws(part: int) -> list[np.random.Generator]:
        name = zlib.crc32(module.encode())
        return [np.random.default_rng((seed, name, part, place)) for place in range(len(terms))]

    if method in ("cat", "svd"):
        a = np.concatenate([weight * a for weight, (a, _) in zip(weighted, factors, strict=True)], axis=0)
        b = np.concatenate([b for _, b in factors], axis=1)
        return (a, b) if method == "cat" else _cut(a, b, largest)
    if method.endswith("_svd"):
        changes = [one.scale(module) * (b @ a) for (one, _), (a, b) in zip(terms, factors, strict=True)]
        change = pruned(changes, [weight for _, weight in terms], draws(0))
        u, s, v = np.linalg.svd(change, full_matrices=False)
        return v[:largest], u[:, :largest] * s[:largest]
    # The sign on one side alone: on both it would vanish.
    roots = [math.sqrt(abs(weight)) for weight in weighted]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, weighted, strict=True)]
    return (
        pruned([a for a, _ in factors], signed, draws(0)),
        pruned([b for _, b in factors], roots, draws(1)),
    )


def _cut(
    a: Float[np.ndarray, "rank inputs"], b: Float[np.ndarray, "outputs rank"], largest: int
) -> tuple[Float[np.ndarray, "cut inputs"], Float[np.ndarray, "outputs cut"]]:
    """``b a`` of its largest singular values, by the triangles of its factors: no matrix as large as the weights."""
    q, r = np.linalg.qr(b)
    p, t = np.linalg.qr(a.T)
    u, s, v = np.linalg.svd(r @ t.T)
    return v[:largest] @ p.T, (q @ u[:, :largest]) * s[:largest]


def _pruning(
    method: str, density: float, majority_sign: str
) -> Callable[[Sequence[Array], Sequence[float], Sequence[np.random.Generator]], Array]:
    """How arrays of one shape become one, given their weights and generators."""
    kind = method.removesuffix("_svd")

    def pruned(arrays: Sequence[Array], weights: Sequence[float], generators: Sequence[np.random.Generator]) -> Array:
        if kind.startswith("dare"):
            arrays = [_drawn(array, density, one) for array, one in zip(arrays, generators, strict=True)]
        elif kind in ("ties", "magnitude_prune"):
            arrays = [_largest(array, density) for array in arrays]
        stacked = np.stack(arrays)
        weighted = stacked * np.reshape(weights, (-1, *[1] * (stacked.ndim - 1)))
        if not kind.endswith("ties"):
            return weighted.sum(axis=0)
        signs = np.sign(stacked)
        votes = (stacked if majority_sign == "total" else signs).sum(axis=0)
        agreeing = signs == np.where(votes >= 0, 1, -1)
        return (weighted * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1)

    return pruned


def _largest(array: Array, density: float) -> Array:
    """The array with all but the largest ``⌊density n⌋`` of its numbers set to 0."""
    kept = int(density * array.size)
    mask = np.zeros(array.size, bool)
    mask[np.argsort(-np.abs(array.reshape(-1)), kind="stable")[:kept]] = True
    return array * mask.reshape(array.shape)


def _drawn(array: Array, density: float, generator: np.random.Generator) -> Array:
    """The array with each number kept by chance and divided by it, so that its mean stays (DARE)."""
    return np.where(generator.random(array.shape) < density, array / density, 0.0)


def _check_arguments(
    adapters: Sequence[str | Path],
    method: str,
    weights: Sequence[float],
    density: float | None,
    rank: int | None,
    majority_sign: str,
) -> list[str]:
    problems = []
    if majority_sign not in get_args(Sign):
        problems.append(f"the majority sign is {majority_sign!r}, not {' or '.join(get_args(Sign))}")
    if len(adapters) < 2:
        problems.append(f"two or more are needed, not {len(adapters)}")
    if method not in METHODS:
        return [*problems, f"there is no method {method!r}{nearest(method, METHODS)}"]
    if len(weights) != len(adapters):
        problems.append(f"there are {len(weights)} weights for {len(adapters)} adapters")
    if not all(map(math.isfinite, weights)):
        problems.append("a weight is not a finite number")
    prunes = method.removesuffix("_svd") in _PRUNING
    if prunes and density is None:
        problems.append(f"{method} needs a density, the share of the numbers that is kept, such as 0.5")
    if density is not None and not prunes:
        problems.append(f"{method} prunes nothing, so it takes no density")
    if density is not None and not 0 < density <= 1:
        problems.append(f"the density {density:g} is not above 0 and up to 1")
    if rank is not None and (rank < 1 or not method.endswith("svd")):
        problems.append("a rank is 1 or more" if rank < 1 else f"the rank of {method} follows from the adapters")
    return problems


def _read(directory: Path, problems: list[str]) -> _Adapter | None:
    """An adapter; None where it cannot be read, which is added to the problems."""
    try:
        config_file, tensor_file = adapter_files(directory)
        values = read_adapter_values(config_file)
    except UserError as error:
        problems.append(str(error))
        return None
    if values["peft_type"] != LORA or values["use_dora"]:
        kind = "DoRA" if values["peft_type"] == LORA else values["peft_type"]
        problems.append(f"{directory}: its kind is {kind}; what merges are plain LoRA adapters")
        return None
    config = AdapterConfig.model_validate(values)
    entries, found = read_header(tensor_file)
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        parsed = _TENSOR.fullmatch(name)
        if parsed is None:
            found.append(f"{name} is no A and no B of a linear layer")
        elif entry.dtype not in DTYPES:
            found.append(f"{name} has the dtype {entry.dtype}, not {', '.join(DTYPES)}")
        else:
            pairs.setdefault(parsed["module"], {})[parsed["part"]] = entry
    for module, parts in pairs.items():
        rank = config.rank(module)
        if len(parts) < 2 or parts["A"].shape[:1] != (rank,) or parts["B"].shape[1:] != (rank,):
            found.append(f"{module} has no A and B of rank {rank}")
    if not pairs and not found:
        found.append("it has no tensors")
    problems += [f"{directory}: {problem}" for problem in found]
    return None if found else _Adapter(directory, config, {name: (of["A"], of["B"]) for name, of in pairs.items()})


def _mismatches(read: Sequence[_Adapter], modules: Sequence[str], method: str) -> list[str]:
    """What keeps adapters from being merged with the first one."""
    problems, first = [], read[0]
    for other in read[1:]:
        for key in ("base_model_name_or_path", "revision"):
            mine, theirs = getattr(first.config, key), getattr(other.config, key)
            if mine != theirs:
                problems.append(f"{key} is {mine!r} in {first.directory} and {theirs!r} in {other.directory}")
    equal = method != "cat" and not method.endswith("svd")
    for module in modules:
        having = [one for one in read if module in one.tensors]
        shapes = [(one.tensors[module][0].shape[1], one.tensors[module][1].shape[0]) for one in having]
        ranks = [one.config.rank(module) for one in having]
        if len(set(shapes)) > 1:
            told = ", ".join(f"{inputs} × {outputs}" for inputs, outputs in shapes)
            problems.append(f"{module} is of different sizes ({told})")
        elif equal and len(set(ranks)) > 1:
            problems.append(
                f"{module} has ranks {', '.join(map(str, ranks))}, and {method} needs equal ones (cat and svd do not)"
            )
    return problems


def _write(
    target: Path, read: Sequence[_Adapter], merged: Mapping[str, tuple[np.ndarray, np.ndarray]], method: str
) -> None:
    ranks = {module: len(a) for module, (a, _) in merged.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # A scale of 1 is an alpha as large as the rank.
    others = {module: own for module, own in ranks.items() if own != rank}
    config = AdapterConfig(
        base_model_name_or_path=read[0].config.base_model_name_or_path,
        revision=read[0].config.revision,
        task_type=read[0].config.task_type,
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(merged),
        lora_dropout=max(one.config.lora_dropout for one in read),
    )
    tensors = {
        tensor_name(module, f"lora_{part}.weight"): np.ascontiguousarray(value, np.float32)
        for module, pair in merged.items()
        for part, value in zip("AB", pair, strict=True)
    }
    readme = _README.format(base=config.base_model_name_or_path, count=len(read), method=method)
    write_adapter(target, config.model_dump(), tensors, readme)
