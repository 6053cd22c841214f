"""The ``search`` section: the space, the trials, how they are scored, proposed and finished."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxtune.config.metrics import COSTS, MetricName, ObjectiveName
from jaxtune.config.section import (
    Amendable,
    Free,
    Parsed,
    PositiveInt,
    Recorded,
    Section,
    Seed,
    UserPath,
    located,
    parsed,
)
from jaxtune.errors import nearest

Confidence = Literal["low", "medium", "high"]
Preset = Literal["lora"]


class DimensionConfig(Section):
    """One searched key: exactly one of the five kinds, and what is believed of it beforehand."""

    log_uniform: Parsed[tuple[float, float] | None, Sequence[float]] = parsed(
        "[low, high]: numbers between them, in equal ratios; unset: another kind.", default=None
    )
    uniform: Parsed[tuple[float, float] | None, Sequence[float]] = parsed(
        "[low, high]: numbers between them; unset: another kind.", default=None
    )
    integer: Parsed[tuple[int, int] | None, Sequence[int]] = parsed(
        "[low, high]: whole numbers from one to the other; unset: another kind.", default=None
    )
    power_of_two: Parsed[tuple[int, int] | None, Sequence[int]] = parsed(
        "[low, high]: numbers that are powers of two, from one to the other; unset: another kind.", default=None
    )
    choice: Parsed[list[Any] | None, Sequence[Any]] = parsed(
        "Two values or more, without an order; unset: another kind.", default=None
    )
    prior: Any | None = Field(
        default=None,
        description="The value that is likely best: trials begin with it and near it, until scores say otherwise "
        "(docs/surrogates.md). If unset, all values are alike.",
    )
    confidence: Confidence | None = Field(
        default=None,
        description="How sure the prior is: within a half (low), a quarter (medium) or an eighth (high) of the range, "
        "one standard deviation; of a choice, 2, 4 or 6 times as likely as another value. If unset, medium.",
    )

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """The fields of which exactly one is set."""
        return tuple(name for name in cls.model_fields if name not in ("prior", "confidence"))

    @model_validator(mode="after")
    def _one_kind(self) -> DimensionConfig:
        kinds = [name for name in self.kinds() if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(self.kinds())}")
        value = getattr(self, kinds[0])
        if kinds[0] == "choice":
            if len(value) < 2:
                raise ValueError("choice needs a list of at least two values")
            return self
        low, high = value
        if low >= high:
            raise ValueError(f"{kinds[0]} needs low < high, not [{low}, {high}]")
        if kinds[0] == "log_uniform" and low <= 0:
            raise ValueError(f"log_uniform needs positive bounds, not [{low}, {high}]")
        if kinds[0] == "power_of_two" and (low < 1 or low & (low - 1) or high & (high - 1)):
            raise ValueError(f"power_of_two needs powers of two, not [{low}, {high}]")
        return self

    @property
    def kind(self) -> str:
        """The name of the one field that is set."""
        return next(name for name in self.kinds() if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _believed(self) -> DimensionConfig:
        if self.prior is None:
            if self.confidence is not None:
                raise located(
                    ("confidence",),
                    self.confidence,
                    f"{self.confidence!r} says how sure a prior is, and there is none; give one",
                )
            return self
        held = getattr(self, self.kind)
        if self.kind == "choice":
            if not any(
                choice == self.prior and isinstance(choice, bool) == isinstance(self.prior, bool) for choice in held
            ):
                raise located(
                    ("prior",), self.prior, f"{self.prior!r} is not among the choices{nearest(self.prior, held)}"
                )
            return self
        if isinstance(self.prior, bool) or not isinstance(self.prior, int | float):
            raise located(("prior",), self.prior, f"{self.prior!r} is not a number")
        within = min(max(self.prior, held[0]), held[1])
        if self.kind == "integer":
            within = round(within)
        elif self.kind == "power_of_two":
            within = 2 ** round(math.log2(within))
        if within != self.prior:
            message = f"{self.prior} is none of {self.kind} {list(held)}; the nearest is {within}"
            raise located(("prior",), self.prior, message)
        return self


METHODS_WITHOUT_MODEL = ("random", "sobol")
"""Search methods that learn nothing from scores."""


class BudgetConfig(Section):
    """What a study may spend on training, finishing included; the first that does not pay for another trial ends it."""

    seconds: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Of training, scoring and testing, added up over trials; no limit if unset.",
    )
    steps: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Optimizer steps of all trials, the reference's among them; no limit if unset."
    )
    flops: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Model FLOPs of all trials' steps; no limit if unset."
    )

    @model_validator(mode="after")
    def _some_limit(self) -> BudgetConfig:
        if self.seconds is None and self.steps is None and self.flops is None:
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self


class BoundConfig(Section):
    """Between which bounds a metric or a counted cost is to be."""

    below: float | None = Field(
        default=None, description="What it is to be less than, in its own unit (a share, bytes, FLOPs); unset: any."
    )
    above: float | None = Field(
        default=None, description="What it is to be more than, in its own unit (a share, bytes, FLOPs); unset: any."
    )

    @model_validator(mode="after")
    def _some(self) -> BoundConfig:
        if self.below is None and self.above is None:
            raise ValueError("give below, above or both")
        if self.below is not None and self.above is not None and self.above >= self.below:
            raise ValueError(f"nothing is above {self.above} and below {self.below}")
        return self


class SearchConfig(Section):
    """The search: many trials for a fraction of their steps, the best finished (arXiv:2407.13906)."""

    space: Parsed[dict[str, DimensionConfig], Mapping[str, DimensionConfig | Mapping[str, Any]]] = parsed(
        "Dotted key -> what to try; or lora, short for preset: lora. Where a rule's method is searched, keys of the "
        "rule apply to trials whose method has them (docs/update_methods.md).",
        default_factory=dict,
    )
    preset: Preset | None = Field(
        default=None,
        description="lora: the usual keys of low-rank rules (rate, warm-up, weight decay; rank, alpha and dropout of "
        "each rule) with priors for the model (docs/surrogates.md), which space changes or adds to. If unset, space "
        "has all keys.",
    )
    method: Annotated[Literal["gp", "random", "sobol", "tpe", "hyperband"], Recorded()] = Field(
        default="gp",
        description="What proposes trials: a Gaussian process, chance, a Sobol sequence, or Optuna's TPE; hyperband is "
        "TPE that also stops trials before the fraction. tpe and hyperband need the extra optuna.",
    )
    acquisition: Annotated[Literal["thompson", "ei"] | None, Recorded()] = Field(
        default=None,
        description="What gp proposes of its candidates: that of the lowest draw from its posterior (thompson), or of "
        "the largest expected improvement. Unset: thompson; a study that has begun keeps what it began with.",
    )
    trials: Annotated[PositiveInt, Recorded(), Amendable()] = Field(
        default=16, description="Configurations that are tried, the reference among them."
    )
    budget: Annotated[Parsed[BudgetConfig | None, Mapping[str, Any]], Recorded(), Amendable()] = parsed(
        "What the study may spend: it proposes no trial that would leave too little to finish the best ones. If unset, "
        "trials says when it ends.",
        default=None,
    )
    terminate: Annotated[Literal["never", "gain"], Recorded(), Amendable()] = Field(
        default="never",
        description="gain: no trial is proposed any more once the next one's expected gain is below what the noise of "
        "the scores can show, for two trials in a row and from ten scores on (docs/surrogates.md).",
    )
    fraction: Annotated[float, Field(gt=0, le=1), Recorded()] = Field(
        default=0.2, description="Share of its steps after which a trial is scored."
    )
    ladder: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Recorded()] = Field(
        default_factory=list,
        description="Shares of the steps before fraction, ascending: all trials are trained to the first, and the "
        "better half at each goes on: more trials for the same steps (docs/surrogates.md).",
    )
    promote: Annotated[PositiveInt, Recorded(), Amendable()] = Field(
        default=5,
        description="How many of the best trials are finished if they go straight to the end; in rungs (finish) the "
        "numbers are others, at the same price.",
    )
    finish: Annotated[list[Annotated[float, Field(gt=0, le=1)]] | None, Recorded()] = Field(
        default=None,
        description="Shares of the steps after fraction, ascending to 1: the trials that are best at fraction go on to "
        "the first, the better half there to the next, at the price of promote trials that go straight to the end. "
        "With [0.4, 1.0], promote 5 and fraction 0.2 that is 8, then 4. Unset: [0.4, 1.0], or straight to the end, "
        "[1.0], where fraction is 0.4 or more, promote 1, a trial too short for a step in between, or where a ladder "
        "or hyperband stops trials; a study that has begun keeps what it began with.",
    )
    promote_by: Annotated[Literal["score", "mean"] | None, Recorded()] = Field(
        default=None,
        description="What ranks the trials that are to go on at fraction and on the ladder: their scores, or the "
        "posterior mean of a Gaussian process at them. At the rungs of finish it is the score. Unset: score, with a "
        "ladder or hyperband mean; a study that has begun keeps what it began with.",
    )
    seeds: Annotated[PositiveInt, Recorded()] = Field(
        default=1,
        description="How often the three best of the finished trials are trained, each time with another seed "
        "(train.seed, train.seed + 1, ...): of several the best mean wins, and the summary has its interval.",
    )
    population: PositiveInt | Literal["auto"] = Field(
        default=1,
        description="Trials that train at the same time, in one compiled step on one copy of the base. 'auto': as many "
        "as the memory of a device holds, at most a quarter of the trials.",
    )
    initial: Annotated[PositiveInt, Recorded()] = Field(
        default=6, description="Trials of the space-filling design, before the surrogate proposes."
    )
    fixed: Annotated[dict[str, Any], Recorded(), Amendable("--fix")] = Field(
        default_factory=dict, description="Searched keys that new trials do not vary any more -> their values."
    )
    start_from: UserPath | None = Field(
        default=None,
        description="Run directory of a study over the same keys, on another task, a part of the data or a smaller "
        "model: its best finished trials come first, in the places of the design (initial less the reference). If "
        "unset, the design is drawn.",
    )
    objective: MetricName = Field(default="loss", description="Validation loss, or a metric of evaluation.task.")
    metrics: Annotated[list[MetricName], Recorded()] = Field(
        default_factory=list,
        description="What is measured beside the objective wherever a trial is scored, for the journal alone.",
    )
    objectives: Annotated[list[ObjectiveName], Recorded()] = Field(
        default_factory=list,
        description="Several objectives that are weighed against one another: metrics of evaluation.task and the "
        "counted costs adapter_bytes (bytes of the trained numbers, float32) and flops (FLOPs of the whole training). "
        "The first, a metric, is the objective, which promotes trials and names the best. If empty: objective alone.",
    )
    where: Parsed[dict[ObjectiveName, BoundConfig], Mapping[str, BoundConfig | Mapping[str, Any]]] = parsed(
        "Metric or counted cost -> bounds that the best trial is to satisfy, such as {adapter_bytes: {below: 8e6}}. No "
        "trial is proposed that does not satisfy those of counted costs.",
        default_factory=dict,
    )
    seed: Annotated[Seed, Recorded()] = Field(
        default=0, description="Seed of the proposals; every trial trains with train.seed."
    )
    reference: Literal["own", "paper"] | dict[str, Any] = Field(
        default="own",
        description="Trial 0, which the others are compared with: 'own' is the configuration as it stands, 'paper' the "
        "values of arXiv:2407.13906; or a mapping of the dotted keys that differ from the configuration. A study that "
        "began when another one was the default keeps it.",
    )
    workers: Annotated[PositiveInt, Free()] = Field(
        default=1,
        description="Processes that train trials, on one machine or several, under Ray (extra 'distributed'); 1 trains "
        "in this process, unless ray_address is given.",
    )
    ray_address: Annotated[str | None, Free()] = Field(
        default=None, description="host:port of a running Ray's head node, or 'auto'; unset starts Ray on this machine."
    )
    worker_resources: Annotated[dict[str, Annotated[float, Field(gt=0)]], Free()] = Field(
        default_factory=dict,
        description="What each worker takes, by Ray's names: {GPU: 1}, {TPU: 4}; if empty a GPU where there is one, "
        "else a CPU core.",
    )

    @model_validator(mode="before")
    @classmethod
    def _named_space(cls, values: Any) -> Any:
        """``space: lora`` is a preset with nothing on top."""
        if not isinstance(values, dict) or not isinstance(name := values.get("space"), str):
            return values
        if name not in (names := typing.get_args(Preset)):
            message = f"{name!r} is no space{nearest(name, names)}, or give a mapping of dotted keys to what to try"
            raise located(("space",), name, message)
        return {**values, "space": {}, "preset": name}

    @model_validator(mode="before")
    @classmethod
    def _first_objective(cls, values: Any) -> Any:
        """The first of several objectives is the objective; one by itself is the objective alone."""
        several = values.get("objectives") if isinstance(values, dict) else None
        if not isinstance(several, list | tuple) or not several or several[0] in COSTS:
            return values
        if values.get("objective", several[0]) != several[0]:
            raise ValueError(
                f"objective is {values['objective']}, but objectives begin with {several[0]}: the first is the "
                f"objective; set objective={several[0]} or leave it out"
            )
        return {**values, "objective": several[0], "objectives": list(several) if len(several) > 1 else []}

    @field_validator("objectives")
    @classmethod
    def _one_metric_first(cls, objectives: list[str]) -> list[str]:
        if len(set(objectives)) < len(objectives):
            raise ValueError(f"names an objective twice: {', '.join(objectives)}")
        if objectives and objectives[0] in COSTS:
            raise ValueError(f"{objectives[0]} is counted and needs no training; begin with a metric, such as loss")
        return objectives

    @field_validator("reference", mode="before")
    @classmethod
    def _reference(cls, value: Any) -> Any:
        """One message for what is neither a name nor a mapping; an empty mapping leaves the configuration as it is."""
        if isinstance(value, dict):
            return value or "own"
        if value not in (names := ("own", "paper")):
            raise ValueError(
                f"{value!r} is no choice{nearest(value, names)}, or give a mapping of dotted keys to values"
            )
        return value

    @property
    def named(self) -> tuple[str, ...]:
        """The objectives, the first one first, and what else ``where`` bounds."""
        return tuple(dict.fromkeys([self.objective, *self.objectives, *self.where]))

    @property
    def counted(self) -> tuple[str, ...]:
        """Those of :attr:`named` that are counted."""
        return tuple(name for name in self.named if name in COSTS)

    @property
    def measured(self) -> tuple[str, ...]:
        """Those of :attr:`named` that are measured, and what is measured beside them."""
        return tuple(name for name in dict.fromkeys([*self.named, *self.metrics]) if name not in COSTS)

    def key_of(self, name: str) -> str:
        """Which key of the section names a metric or a cost."""
        if name in self.objectives:
            return "objectives"
        if name == self.objective:
            return "objective"
        return f"where.{name}" if name in self.where else f"metrics.{self.metrics.index(name)}"

    @model_validator(mode="after")
    def _address(self) -> SearchConfig:
        if self.ray_address not in (None, "auto") and not re.fullmatch(r"[^:/\s]+:\d{1,5}", self.ray_address or ""):
            raise ValueError(f"ray_address is host:port or auto, not {self.ray_address}")
        return self

    @model_validator(mode="after")
    def _promotable(self) -> SearchConfig:
        if self.promote > self.trials:
            raise ValueError(f"promote {self.promote} is above trials {self.trials}")
        if list(self.ladder) != sorted(set(self.ladder)) or any(rung >= self.fraction for rung in self.ladder):
            raise ValueError(f"ladder {self.ladder} must ascend and stay below fraction {self.fraction}")
        if self.finish is not None:
            *rungs, end = self.finish or [0.0]
            if end != 1 or self.finish != sorted(set(self.finish)) or any(rung <= self.fraction for rung in rungs):
                raise ValueError(f"finish {self.finish} must ascend, above fraction {self.fraction}, and end in 1.0")
        if self.seeds > 1 and "train.seed" in self.space:
            raise ValueError("seeds repeats trials with other train.seed, which space searches; leave one of them out")
        if self.ladder and self.method == "hyperband":
            raise ValueError("ladder: method 'hyperband' has rungs of its own; choose another method, or no ladder")
        if self.start_from is not None and (places := min(self.initial, self.trials)) < 2:
            key = "initial" if self.initial == places else "trials"
            raise ValueError(
                f"start_from: with {key} {places} the first trial, the reference, leaves no place for a trial of "
                f"{self.start_from}; set {key} to 2 or more, or leave start_from out"
            )
        return self
