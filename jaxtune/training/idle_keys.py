"""Keys of a configuration that never act, told before training: whoever wrote one expects something of it.

A key at its default is nobody's mistake, and is not told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from jaxtune.config import Config, dotted
from jaxtune.config.search_section import METHODS_WITHOUT_MODEL, SearchConfig
from jaxtune.config.training_sections import TrainConfig
from jaxtune.updates.resolved import ResolvedPlan

logger = logging.getLogger(__name__)


def idle_keys(config: Config, plan: ResolvedPlan) -> list[str]:
    """A message for each key that never acts.

    Args:
      config: resolved, with ``train.steps``.
      plan: of its model.
    """
    return [*(message for check in _CHECKS for message in check(config)), *_ranks(config, plan)]


def tell_idle_keys(config: Config, plan: ResolvedPlan) -> None:
    """Warns of each key that never acts; see :func:`idle_keys`."""
    for message in idle_keys(config, plan):
        logger.warning("never acts: %s", message)


def _beyond_the_steps(config: Config) -> Iterator[str]:
    train, steps = config.train, config.train.steps or 0
    for key, every, instead in (
        ("evaluate_every", train.evaluate_every, "evaluated at the end alone"),
        ("checkpoint_every", train.checkpoint_every, "saved at the end, and by train.checkpoint_minutes"),
        ("keep.every", train.keep.every, "no checkpoint is kept for it but the last"),
    ):
        if every is not None and every > steps:
            yield f"train.{key}: {every} is beyond the last step, {steps}: {instead}"
    if train.log_every > steps and train.log_every != TrainConfig.model_fields["log_every"].default:
        yield f"train.log_every: {train.log_every} is beyond the last step, {steps}, which alone is logged"


def _patience(config: Config) -> Iterator[str]:
    train, steps = config.train, config.train.steps or 0
    if train.patience is None or train.evaluate_every is None:
        return
    # The first evaluation is the best so far, and the one at the end has nothing left to stop.
    before = (steps - 1) // train.evaluate_every
    if train.patience + 1 > before:
        yield (
            f"train.patience: {train.patience} evaluations without improvement cannot pass before the end: there are "
            f"{before} by train.evaluate_every before step {steps}"
        )


def _best_of_none(config: Config) -> Iterator[str]:
    train = config.train
    if train.keep.best == 1:
        return
    if config.data.validation is None:
        yield f"train.keep.best: {train.keep.best} by their validation loss, and there is no data.validation"
    elif train.evaluate_every is None or train.evaluate_every >= (train.steps or 0):
        yield f"train.keep.best: {train.keep.best} by their validation loss, which the last checkpoint alone has"


def _schedule(config: Config) -> Iterator[str]:
    optimizer, steps = config.optimizer, config.train.steps or 0
    if optimizer.schedule == "constant" and optimizer.final_scale > 0:
        yield f"optimizer.final_scale: {optimizer.final_scale} does nothing: optimizer.schedule is constant"
    if 0 < optimizer.warmup * steps <= 1 and optimizer.warmup != type(optimizer).model_fields["warmup"].default:
        yield f"optimizer.warmup: {optimizer.warmup} of {steps} steps is no more than one step, which is none"


def _ranks(config: Config, plan: ResolvedPlan) -> Iterator[str]:
    """A product of two matrices has no larger rank than the smallest of their sides."""
    configured = dotted(config)
    for key, rooms in plan.rooms().items():
        searched = config.search is not None and key in config.search.space
        rank = max(room.capacity for room in rooms.values()) if searched else configured[key]
        if narrow := {path: room.useful for path, room in rooms.items() if room.useful < rank}:
            at = f"search.space.{key}" if rank > configured[key] else key
            where = ", ".join(f"{path} ({side})" for path, side in narrow.items())
            yield f"{at}: {rank} is above the smaller side of {where}: a larger rank adds nothing there"


def _places(config: Config) -> Iterator[str]:
    if (search := config.search) is None:
        return
    if isinstance(search.population, int) and search.population > search.trials:
        yield f"search.population: {search.population} is above search.trials, {search.trials}: the rest stays empty"
    if search.workers > search.trials:
        yield f"search.workers: {search.workers} is above search.trials, {search.trials}: the rest stays idle"
    if search.worker_resources and search.workers == 1 and search.ray_address is None:
        yield "search.worker_resources: there are no workers; set search.workers or search.ray_address"


def _proposals(config: Config) -> Iterator[str]:
    if (search := config.search) is None or not search.space:
        return
    population = search.population if isinstance(search.population, int) else 1
    # Trials that train side by side are proposed before any of them is scored.
    key, first = max(("initial", search.initial), ("population", population + 1), key=lambda item: item[1])
    default = key == "initial" and first == SearchConfig.model_fields["initial"].default
    if search.method not in METHODS_WITHOUT_MODEL and first >= search.trials > 1 and not default:
        yield f"search.method: {search.method} never proposes: search.{key} leaves it none of {search.trials} trials"
    if search.acquisition is not None and search.method != "gp":
        yield f"search.acquisition: {search.acquisition} chooses among the candidates of gp; method is {search.method}"
    if search.fraction == 1.0:
        yield f"search.promote: {search.promote} does nothing: search.fraction 1.0 trains all trials to their end"


_CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    _beyond_the_steps,
    _patience,
    _best_of_none,
    _schedule,
    _places,
    _proposals,
)
