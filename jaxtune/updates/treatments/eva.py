"""EVA (arXiv:2410.07170): LoRA that starts from the data, along the directions in which a layer's inputs vary most."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from jaxtune.config.section import PositiveInt
from jaxtune.errors import UserError
from jaxtune.late import TYPES, jnp, np
from jaxtune.updates.treatments.base import NO_RULE, Arrays, Effect, Exported, Room, Shape, Values
from jaxtune.updates.treatments.low_rank import LowRank, RankRule

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Key, UInt32


class EvaRule(RankRule):
    """Linear layers whose low-rank term starts along the largest variance of their inputs (EVA, arXiv:2410.07170)."""

    method: Literal["eva"] = Field(
        default="eva", description="These linear layers get a low-rank term that starts from the data."
    )
    rho: float = Field(
        default=2.0,
        ge=1.0,
        description="Most columns of a layer, as a factor on the rank; others then have fewer. 1 moves none.",
    )
    batches: PositiveInt = Field(
        default=8, description="The start is made of the batches of so many steps, the first ones of training."
    )


class Directions(NamedTuple):
    """Principal components of a layer's inputs so far.

    Attributes:
      components: unit vectors, the most important first.
      singular: singular values of the inputs less their mean.
      mean: of the inputs.
      energy: sum of squares of the inputs less their mean.
      number: of the inputs.
    """

    components: Float[np.ndarray, "k inputs"]
    singular: Float[np.ndarray, " k"]
    mean: Float[np.ndarray, " inputs"]
    energy: float
    number: int


@dataclasses.dataclass(frozen=True, eq=False)
class Eva(LowRank):
    """A starts as the principal components of the layer's inputs, B at zero.

    The inputs are those of positions whose losses count, so that prompts are left out. The ranks of a rule are given to
    where they explain most: of the components of all its layers, those that explain the largest shares of their
    layers' variances, at most ``rho · rank`` in a layer, and as many in all as there would be. The scale is the rule's
    alpha / rank in all layers. A layer that gets none is not changed.

    How many each layer gets is kept for every rank up to the capacity, so that the rank is traced.

    Attributes:
      most: the largest rank that a rule may have; ``capacity`` is what a layer may get.
    """

    Section = EvaRule
    serves_head = False

    most: int

    @classmethod
    def sized(cls, sections: Mapping[int, Any], capacity: Mapping[str, int]) -> dict[str, Any]:
        """Room for ``rho`` times the largest rank."""
        most = super().sized(sections, capacity)["capacity"]
        return {"most": most, "capacity": round(most * max(section.rho for section in sections.values()))}

    def fixed(self) -> Arrays:
        """How many columns each layer has in use, by the rank of its rule."""
        shape = self.stacked((None, self.most + 1))
        return {"ranks": Shape(shape.shape, shape.axes, "int32")}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """Before anything is known of the data: LoRA's start, and the rank of its rule for each layer."""
        arrays, _ = super().init(key, base, values)
        ranks = jnp.broadcast_to(jnp.arange(self.most + 1, dtype=jnp.int32), self.fixed()["ranks"].shape)
        return arrays, {"ranks": ranks}

    @property
    def observed_batches(self) -> int:
        """The most that a rule asks for."""
        return max(int(self.value(rule, "batches", {})) for rule in self.used_rules)

    @property
    def learns(self) -> Any:
        """Modules of one input and one capacity learn the same."""
        return self.capacity, self.observed_batches

    def observe(self, seen: np.ndarray, learned: Any) -> list[Directions | None]:
        """The principal components of each layer's inputs."""
        count = min(self.capacity, self.inputs)
        before = [None] * len(seen) if learned is None else learned
        return [more_directions(one, layer, count) for one, layer in zip(before, seen, strict=True)]

    @classmethod
    def informed(cls, parts: Mapping[str, Any], learned: Mapping[str, Any]) -> dict[str, tuple[Arrays, Arrays]]:
        """A of the components, B zero, and the ranks."""
        found: dict[str, tuple[Arrays, Arrays]] = {}
        for path, part in parts.items():
            if None in learned[path]:
                raise UserError("update: method eva starts from the first batches, and no loss counts in them")
            a = np.zeros((len(part.rules), part.inputs, part.capacity), np.float32)
            for layer, one in enumerate(learned[path]):
                a[layer, :, : len(one.components)] = one.components.T
            b = np.zeros(part.arrays()["b"].shape, np.float32)
            found[path] = {"a": a, "b": b}, {"ranks": np.zeros((len(part.rules), part.most + 1), np.int32)}
        for rule in {rule for part in parts.values() for rule in part.used_rules}:
            layers = [
                (path, layer) for path, part in parts.items() for layer, own in enumerate(part.rules) if own == rule
            ]
            shares = [explained(learned[path][layer]) for path, layer in layers]
            most = max(part.most for part in parts.values() if rule in part.used_rules)
            rho = next(part.value(rule, "rho", {}) for part in parts.values() if rule in part.used_rules)
            for rank in range(1, most + 1):
                for (path, layer), own in zip(layers, redistributed(shares, rank, rho), strict=True):
                    if rank <= parts[path].most:
                        found[path][1]["ranks"][layer, rank] = own
        return found

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """As LoRA's, with the columns that each layer got."""
        del base
        return Effect(adapters={self.path: self.adapter({**arrays, **fixed}, values, seed)})

    def columns(self, arrays: Mapping[str, Array], values: Values) -> Float[Array, " layers"]:
        """As many as the layer got at the rank of its rule."""
        rank = self.gathered("rank", values).astype(jnp.int32)
        return jnp.take_along_axis(arrays["ranks"], rank[:, None], axis=1)[:, 0].astype(jnp.float32)

    def check(self, values: Values) -> None:
        """Ranks lie between 1 and the capacity, and a layer has as many directions as it may get."""
        for index, rank in zip(self.rules, self.ranks(values), strict=True):
            if index == NO_RULE:
                continue
            if not 1 <= rank <= self.most:
                raise UserError(f"update.{index}.rank: {rank} is not between 1 and the capacity {self.most}")
            if rank > self.inputs:
                raise UserError(
                    f"update.{index}.rank: {rank} is above the {self.inputs} inputs of {self.path}, and method eva "
                    "starts from as many directions of them; lower it, or match other layers"
                )

    def rooms(self) -> dict[str, Room]:
        """Of each rule's rank."""
        room = Room(self.most, min(self.inputs, self.outputs))
        return {f"update.{rule}.rank": room for rule in self.used_rules}

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """A plain LoRA of the ranks that the layers got, each with the alpha that gives its rule's scale."""
        for layer, index in enumerate(self.rules):
            if index == NO_RULE:
                continue
            rank = int(self.value(index, "rank", values))
            own = int(fixed["ranks"][layer, rank])
            if own == 0:
                continue
            a, b = arrays["a"][layer], arrays["b"][layer]
            config = {
                "r": own,
                "lora_alpha": float(self.value(index, "alpha", values)) * own / rank,
                "lora_dropout": float(self.value(index, "dropout", values)),
                "use_rslora": False,
            }
            tensors = {
                "lora_A.weight": np.ascontiguousarray(a[:, :own].T),
                "lora_B.weight": np.ascontiguousarray(b[:own].T),
            }
            yield Exported(self.path, layer, tensors, config)


def more_directions(
    before: Directions | None, inputs: Float[np.ndarray, "positions inputs"], count: int
) -> Directions | None:
    """The first principal components of inputs, given those of earlier ones, in float64 (Ross et al. 2008).

    Args:
      before: of the inputs so far.
      inputs: further ones.
      count: so many components are kept.
    """
    if not len(inputs):
        return before
    rows = np.asarray(inputs, np.float64)
    mean, size = rows.mean(axis=0), len(rows)
    centred = rows - mean
    energy, total, middle = float(np.sum(centred**2)), size, mean
    stack = [centred]
    if before is not None:
        total = before.number + size
        moved = np.sqrt(before.number * size / total) * (before.mean - mean)
        stack = [before.singular[:, None] * before.components, centred, moved[None]]
        energy += before.energy + float(np.sum(moved**2))
        middle = (before.number * before.mean + size * mean) / total
    _, singular, components = np.linalg.svd(np.concatenate(stack), full_matrices=False)
    # Which of two opposite directions it is means nothing: one is settled.
    signs = np.sign(np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1))
    return Directions((components * signs)[:count], singular[:count], middle, energy, total)


def explained(directions: Directions) -> Float[np.ndarray, " k"]:
    """The share of the inputs' variance that lies along each of the components."""
    return directions.singular**2 / max(directions.energy, 1e-30)


def redistributed(shares: list[Float[np.ndarray, " k"]], rank: int, rho: float) -> list[int]:
    """How many components each layer gets of ``rank`` for each: those of the largest shares.

    Args:
      shares: of each layer, descending.
      rank: so many are there for each layer on average.
      rho: a layer gets at most ``rho · rank``.
    """
    wanted = [each[: round(rank * rho)] for each in shares]
    layers = np.repeat(np.arange(len(wanted)), [len(each) for each in wanted])
    order = np.argsort(-np.concatenate(wanted), kind="stable")[: rank * len(wanted)]
    return np.bincount(layers[order], minlength=len(wanted)).tolist()
