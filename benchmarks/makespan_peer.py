"""The peer of the makespan benchmark: Optuna over PEFT and transformers on torch, one trial after another.

Knows nothing of jaxtune: it reads ``task.json`` and ``examples.npz`` (see :mod:`makespan_task`), tokens ready made. The
loop is a plain one, leaner than transformers' own trainer: no logging, no checkpoints, no collator.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from train_step import padded, peft_loss
from transformers import AutoModelForCausalLM, get_scheduler

Tell = Callable[[int, str, int, float], None]
"""Is told of every score: trial, ``scored`` or ``finished`` or ``failed``, step, validation loss."""


class Saved(NamedTuple):
    """What a stopped trial needs to go on: its adapter, its optimizer's and its schedule's state."""

    adapter: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]


class Peer:
    """Trains and scores configurations.

    Args:
      folder: as :func:`makespan_task.prepare` leaves it.

    Attributes:
      steps_run: optimizer steps of all trials.
    """

    def __init__(self, folder: Path):
        self.task = json.loads((folder / "task.json").read_text())
        arrays = np.load(folder / "examples.npz")
        self._train, self._validation = _examples(arrays, "train"), _examples(arrays, "validation")
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, self.task["dtype"])
        base = AutoModelForCausalLM.from_pretrained(self.task["model"], dtype=dtype, attn_implementation="sdpa")
        self._base = base.to(self._device)
        self.steps_run = 0

    def loss(self, model: Any) -> float:
        """The validation loss: the mean over all tokens that are learnt, whatever the batches."""
        size, total, count = self.task["validation_group"], 0.0, 0
        model.eval()
        with torch.no_grad():
            for begin in range(0, len(self._validation), size):
                batch = _batch(self._validation[begin : begin + size])
                learnt = int((batch[2][:, 1:] != -100).sum())
                total += float(peft_loss(model, batch)) * learnt
                count += learnt
        return total / count

    def untuned(self) -> float:
        """The validation loss of the base model."""
        return self.loss(self._base)

    def train(self, values: dict[str, Any], start: int, until: int, saved: Saved | None) -> tuple[float, Saved]:
        """Trains a configuration from step ``start`` to ``until`` and scores it; NaN where it diverged."""
        task, values = self.task, {**self.task["fixed"], **values}
        torch.manual_seed(task["seed"])
        lora = LoraConfig(
            r=values["update.0.rank"],
            lora_alpha=values["update.0.alpha"],
            lora_dropout=values["update.0.dropout"],
            target_modules=list(task["modules"]),
        )
        model: Any = get_peft_model(self._base, lora)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=values["optimizer.learning_rate"],
            weight_decay=values["optimizer.weight_decay"],
            betas=tuple(task["betas"]),
            eps=task["epsilon"],
        )
        schedule = get_scheduler(
            {"constant": "constant_with_warmup"}.get(task["schedule"], task["schedule"]),
            optimizer,
            num_warmup_steps=round(values["optimizer.warmup"] * task["steps"]),
            num_training_steps=task["steps"],
        )
        if saved is not None:
            set_peft_model_state_dict(model, saved.adapter)
            optimizer.load_state_dict(saved.optimizer)
            schedule.load_state_dict(saved.schedule)
        try:
            if not self._steps(model, trained, optimizer, schedule, task["groups"][start:until]):
                return math.nan, Saved({}, {}, {})
            score = self.loss(model)
            state = Saved(get_peft_model_state_dict(model), optimizer.state_dict(), schedule.state_dict())
            return score, copy.deepcopy(state)
        finally:
            # The base is used again: taking the adapter out is cheaper than reading the model anew.
            self._base = model.unload()

    def _steps(self, model: Any, trained: list[Any], optimizer: Any, schedule: Any, groups: list[list[int]]) -> bool:
        """Optimizer steps over groups of examples; whether every loss was a number."""
        model.train()
        for group in groups:
            loss = peft_loss(model, _batch([self._train[place] for place in group]))
            if not math.isfinite(float(loss.detach())):
                return False
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, self.task["clip_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            self.steps_run += 1
        return True

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """A configuration of the space."""
        return {dimension["key"]: _suggest(trial, dimension) for dimension in self.task["space"]}

    def study(self) -> optuna.Study:
        """An empty study; its first trial will be the reference."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=self.task["seed"]), pruner=optuna.pruners.MedianPruner()
        )
        study.enqueue_trial({dimension["key"]: self._coordinate(dimension) for dimension in self.task["space"]})
        return study

    def _coordinate(self, dimension: dict[str, Any]) -> Any:
        value = self.task["reference"][dimension["key"]]
        return value.bit_length() - 1 if dimension["kind"] == "power_of_two" else value

    def pruned(self, tell: Tell) -> None:
        """A study as Optuna's users run it: the median pruner decides at the first evaluation who trains on."""
        task, study = self.task, self.study()
        for _ in range(task["trials"]):
            trial = study.ask()
            values = self.suggest(trial)
            score, saved = self.train(values, 0, task["early"], None)
            tell(trial.number, _event(score, "scored"), task["early"], score)
            trial.report(score, task["early"])
            if not math.isfinite(score) or trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                continue
            score, _ = self.train(values, task["early"], task["steps"], saved)
            tell(trial.number, _event(score, "finished"), task["steps"], score)
            _finish(study, trial, score)

    def at_fraction(self, tell: Tell) -> None:
        """The same stopping as jaxtune's: all trials to the fraction, then the reference and the best to the end."""
        task, study = self.task, self.study()
        early: dict[int, tuple[float, dict[str, Any], Saved]] = {}
        for _ in range(task["trials"]):
            trial = study.ask()
            values = self.suggest(trial)
            score, saved = self.train(values, 0, task["early"], None)
            tell(trial.number, _event(score, "scored"), task["early"], score)
            _finish(study, trial, score)
            if math.isfinite(score):
                early[trial.number] = score, values, saved
        best = sorted((number for number in early if number), key=lambda number: early[number][0])
        for number in [*([0] if 0 in early else []), *best[: task["promote"]]]:
            _, values, saved = early[number]
            score, _ = self.train(values, task["early"], task["steps"], saved)
            tell(number, _event(score, "finished"), task["steps"], score)


def _finish(study: optuna.Study, trial: optuna.Trial, score: float) -> None:
    """Tells the sampler a trial's score, or that there is none."""
    if math.isfinite(score):
        study.tell(trial, score)
    else:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _event(score: float, name: str) -> str:
    return name if math.isfinite(score) else "failed"


def _examples(arrays: Any, part: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and loss weights of each example."""
    cuts = arrays[f"{part}_ends"][:-1]
    tokens, weights = (np.split(arrays[f"{part}_{name}"], cuts) for name in ("tokens", "weights"))
    return list(zip(tokens, weights, strict=True))


def _batch(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Any, Any, Any]:
    return padded([tokens for tokens, _ in examples], [weights for _, weights in examples])


def _suggest(trial: optuna.Trial, dimension: dict[str, Any]) -> Any:
    key, kind, low, high = (dimension[name] for name in ("key", "kind", "low", "high"))
    if kind == "choice":
        return trial.suggest_categorical(key, dimension["choices"])
    if kind in ("log_uniform", "uniform"):
        return trial.suggest_float(key, low, high, log=kind == "log_uniform")
    number = trial.suggest_int(key, low, high)
    return 2**number if kind == "power_of_two" else number


def peak_device_memory() -> int | None:
    """Most bytes in use on the GPU; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
