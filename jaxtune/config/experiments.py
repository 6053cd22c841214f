"""The section ``study``: one part for each of the experiments that ``jaxtune study`` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from jaxtune.config.metrics import ExampleMetricName
from jaxtune.config.section import Parsed, PositiveInt, Section, Seed, UserPath, parsed


def _no_seed_twice(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"names a seed twice: {seeds}")
    return seeds


class EarlyScoreConfig(Section):
    """How well scores at a fraction of the steps foretell the final ones: every trial is trained to its end."""

    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=[0.05, 0.1, 0.2, 0.4, 0.7, 1.0],
        min_length=2,
        description="Shares of its steps after which every trial is scored, rising; the last one is 1.",
    )
    test: bool = Field(default=False, description="Measure every finished trial, and the untuned model, on data.test.")

    @field_validator("fractions")
    @classmethod
    def _rising_to_the_end(cls, fractions: list[float]) -> list[float]:
        if fractions != sorted(set(fractions)) or fractions[-1] != 1:
            raise ValueError(f"needs rising shares that end with 1.0, not {fractions}")
        return fractions


class AblationConfig(Section):
    """The winner of a search with each searched hyperparameter set back to the reference, one at a time."""

    search: UserPath | None = Field(
        default=None,
        description="Directory of a finished search of the same configuration; if unset, the search is run first, in "
        "<run_dir>/search.",
    )
    seeds: list[Seed] = Field(
        default=[1, 2, 3, 4, 5],
        min_length=2,
        description="train.seed of the repetitions that are compared in pairs; best others than the search's, which "
        "favours its winner.",
    )

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        return _no_seed_twice(seeds)


class DataSizeConfig(Section):
    """How the score grows with the data that are trained on; every run keeps the model of its best evaluation."""

    unit: Literal["documents", "examples"] = Field(
        default="documents",
        description="What sizes count: documents (rows of data.train), each with all of its examples, or single "
        "examples. With examples, train.epochs are passes over the size's own; documents all train for equal steps.",
    )
    sizes: list[Literal["all"] | Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        min_length=4,
        description="Documents, or examples, to train on; 0 is the untuned model. A geometric grid if unset.",
    )
    points: Annotated[PositiveInt, Field(ge=3)] = Field(
        default=6, description="Sizes of the grid, in equal ratios from smallest to all; 0 comes on top."
    )
    smallest: PositiveInt = Field(default=20, description="Smallest size of the grid above 0.")
    seeds: list[Seed] = Field(
        default=[1, 2, 3],
        min_length=2,
        description="Each draws its own nested subsets, adapters and order of batches.",
    )
    sampling: Literal["random", "stratified", "balanced"] = Field(
        default="random",
        description="How they are drawn: at random, with every group's share as in all of them (of examples those "
        "without an answer are a group too), or with groups equally often for as long as there are any.",
    )
    group_by: str | None = Field(
        default=None, description="Field that tells an example's group; if unset, the attribute of data.explode."
    )
    score: ExampleMetricName = Field(
        default="loss",
        description="What is measured on data.test: the loss, or a metric of evaluation.task that is a mean over "
        "examples.",
    )
    saturation: Literal["ceiling", "gap"] = Field(
        default="ceiling",
        description="Where gains end: at the smallest size near the fitted ceiling (epsilon), or at the smallest whose "
        "gap to the largest, paired over seeds and test documents, is below a tenth of the whole gain at 95 %.",
    )
    epsilon: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="A size is saturated when its mean score is this near the fitted ceiling; within one standard "
        "error if unset.",
    )

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        return _no_seed_twice(seeds)


class TransferConfig(Section):
    """Whether the order of configurations in cheaper settings is that of the full one."""

    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Name -> dotted overrides that make training cheaper, such as {train.steps: 100}.",
    )


class MethodsConfig(Section):
    """Update methods beside each other: a rate is searched for each, then it trains with that rate over seeds."""

    compare: Parsed[dict[str, dict[str, Any]], Sequence[str] | Mapping[str, Mapping[str, Any]]] = parsed(
        "The methods, at least two; the first is what the others are compared with. A list of names, each the method "
        "of update.0; or name -> dotted overrides of update and optimizer, of which optimizer.learning_rate is the "
        "middle of the method's rates ({dora: {}, all: {update.0.method: full, optimizer.learning_rate: 1e-4}}).",
        default_factory=dict,
    )
    rates: Annotated[PositiveInt, Field(ge=3)] = Field(
        default=5, description="Trials that compare rates of a method at first, half a decade apart."
    )
    further: Annotated[int, Field(ge=0)] = Field(
        default=4,
        description="Trials with further rates that a method gets at most, one by one, while its best rate is an end.",
    )
    rate_steps: PositiveInt | None = Field(
        default=None, description="Steps of a run that compares rates, on a schedule of its own; if unset, train.steps."
    )
    seeds: list[Seed] = Field(
        default=[1, 2, 3],
        min_length=2,
        description="train.seed of the runs with the best rate; best others than train.seed, which has chosen it.",
    )
    score: ExampleMetricName = Field(
        default="loss",
        description="What is measured on data.test of these runs: the loss, or a metric of evaluation.task that is a "
        "mean over examples. Rates are compared by search.objective on data.validation.",
    )

    @field_validator("compare", mode="before")
    @classmethod
    def _named(cls, compare: Any) -> Any:
        """A list of names overrides nothing else."""
        if not isinstance(compare, list | tuple) or not all(isinstance(name, str) for name in compare):
            return compare
        if twice := sorted({name for name in compare if compare.count(name) > 1}):
            raise ValueError(f"names {twice[0]} twice")
        return {name: {} for name in compare}

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        return _no_seed_twice(seeds)


class ExperimentsConfig(Section):
    """The experiments of ``jaxtune study``, each a sub-section; what they leave, and how sure their intervals are."""

    output: Annotated[UserPath, Field(min_length=1)] | None = Field(
        default=None,
        description="Folder of summary.json, figures and page; default: docs/experiments/<study>-<name>.",
    )
    bootstrap: Annotated[PositiveInt, Field(ge=100, le=100_000)] = Field(
        default=2000, description="Draws of a bootstrap interval."
    )
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.95, description="Coverage of the intervals.")
    early_score: Parsed[EarlyScoreConfig, Mapping[str, Any]] = parsed(
        "What early scores foretell.", default=EarlyScoreConfig()
    )
    data_size: Parsed[DataSizeConfig, Mapping[str, Any]] = parsed(
        "How the score grows with the data.", default=DataSizeConfig()
    )
    transfer: Parsed[TransferConfig, Mapping[str, Any]] = parsed(
        "What cheaper settings foretell.", default=TransferConfig()
    )
    ablation: Parsed[AblationConfig, Mapping[str, Any]] = parsed("What made the winner.", default=AblationConfig())
    methods: Parsed[MethodsConfig, Mapping[str, Any]] = parsed("What to update, and how.", default=MethodsConfig())
