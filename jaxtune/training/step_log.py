"""What is logged of a run's steps, and when their metrics are read from the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from jaxtune.telemetry.throughput import Throughput, Window
from jaxtune.telemetry.writers import MetricWriter
from jaxtune.training.divergence import Divergence


@runtime_checkable
class Hears(Protocol):
    """Is told the metrics of a step at once."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step were logged."""
        ...


class StepLog:
    """The logged steps of a run: their metrics wait on the device until they are read, and then to be written.

    A step that was evaluated is one record with its evaluation. The first step that is not finite is the last one
    logged, whenever it is found.

    Args:
      writer: takes the record of every logged step.
      listener: is told the same, for people, and sooner.
      throughput: counts the steps.

    Attributes:
      metrics: training metrics of the last logged step.
    """

    def __init__(self, writer: MetricWriter | None, listener: Hears | None, throughput: Throughput):
        self.metrics: dict[str, float] = {}
        self._writer, self._listener, self._throughput = writer, listener, throughput
        self._divergence = Divergence()
        self._pending: tuple[int, Mapping[str, Any], Window] | None = None
        self._record: tuple[int, Mapping[str, float]] | None = None

    def launched(self, step: int, metrics: Mapping[str, Any], *, logged: bool) -> None:
        """A step was launched. What is logged before it is written while it runs: the device never waits for that.

        Args:
          step: its number.
          metrics: on the device or not.
          logged: whether it is to be logged.
        """
        self.flush()
        self._divergence.launched(step, metrics)
        if logged and self.first_diverged is None:
            self._pending = (step, metrics, self._throughput.close())

    @property
    def first_diverged(self) -> int | None:
        """The first step that is known not to be finite."""
        return None if self._divergence.first is None else self._divergence.first[0]

    def diverged(self, step: int) -> bool:
        """Waits for the steps up to one, and tells whether one of them was not finite."""
        if self.first_diverged is None and self._divergence.read(step) and self._divergence.first is not None:
            self._pending = (*self._divergence.first, self._throughput.close())
        return self.first_diverged is not None

    def read(self) -> None:
        """Waits for the metrics of a logged step and tells the listener; they begin the step's record."""
        if self._pending is None:
            return
        self.diverged(self._pending[0])
        step, arrays, window = self._pending
        self._pending = None
        self.metrics = {name: float(value) for name, value in jax.device_get(dict(arrays)).items()}
        self.metrics |= self._throughput.rates(window)
        self._record = (step, self.metrics)
        self._tell(step, self.metrics)

    def evaluated(self, step: int, evaluation: Mapping[str, float]) -> None:
        """Adds an evaluation to its step's record and writes that."""
        self._record = (step, {**(self._record[1] if self._record else {}), **evaluation})
        self.flush()
        self._tell(step, evaluation)

    def flush(self) -> None:
        """Writes the record of a logged step."""
        self.read()
        if self._record and self._writer:
            self._writer.write(*self._record)
        self._record = None

    def _tell(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._listener:
            self._listener.on_metrics(step, metrics)
