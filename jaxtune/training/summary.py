"""What a run came to, for programs, type checkers and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from jaxtune.telemetry.tables import html_table


class Summary(dict[str, Any]):
    """What a ``summary.json`` holds; its keys are attributes as well."""

    __slots__ = ()

    if not TYPE_CHECKING:  # a checker knows the attributes of a subclass by their annotations, and no others

        def __getattr__(self, name: str) -> Any:
            try:
                return self[name]
            except KeyError:
                raise AttributeError(f"{type(self).__name__} has no {name!r}, but {', '.join(self)}") from None


class AdapterFiles(TypedDict):
    """Where an adapter, or a whole model, lies, and the step it is of."""

    path: str
    step: int


class PlannedSteps(TypedDict):
    """How long a run was to be, and the step from which on that was so."""

    from_step: int
    steps: int


class RunSummary(Summary):
    """What ``jaxtune train`` came to, as in the run's ``summary.json``; each key is an attribute as well.

    Attributes:
      name: of the run.
      run_dir: its directory.
      stopped: ``finished``, ``patience``, or ``signal``: then there is no file yet, and the same call goes on.
      steps: optimizer steps done in all.
      planned: how long it was to be, and from which step on; more than one where it was taken further.
      metrics: the last metrics of training and evaluation, by name; None where one was not finite.
      trained_parameters: how many numbers are trained.
      examples: examples of each split that was read.
      examples_per_step: in the mean; None where no step was run.
      compilations: programs that steps were compiled to.
      seconds: wall-clock time.
      peak_device_bytes: largest memory in use on a device; None where the platform does not tell.
      adapter: the PEFT adapter's ``path`` and ``step``; None unless all that is trained are low-rank terms.
      model: ``path`` and ``step`` of the whole model, where no adapter holds all that is trained; else None.
    """

    __slots__ = ()

    name: str
    run_dir: str
    stopped: str
    steps: int
    planned: Sequence[PlannedSteps]
    metrics: Mapping[str, float | None]
    trained_parameters: int
    examples: Mapping[str, int]
    examples_per_step: float | None
    compilations: int
    seconds: float
    peak_device_bytes: int | None

    @property
    def adapter(self) -> AdapterFiles | None:
        """The PEFT adapter."""
        return self.get("adapter")

    @property
    def model(self) -> AdapterFiles | None:
        """The whole model."""
        return self.get("model")

    def _repr_html_(self) -> str:
        row = {"steps": self.steps, "stopped": self.stopped, **self.metrics, "seconds": self.seconds}
        return html_table([row], title=f"{self.name}: {self.run_dir}")
