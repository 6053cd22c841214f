"""Optimizers, a file each: its section of the configuration, and what that builds (``optimizer.kind``).

Each file's name is the optimizer's, and nothing lists them. A file imports jax where it builds, because the
configuration reads its section without.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable


@runtime_checkable
class Optimizer(Protocol):
    """What moves the trained parameters: pure functions, part of the compiled step.

    Attributes:
      scheduled: whether the learning rate of the configuration is what it is multiplied by; else it has its own.
      reselects: whether its state goes along where other layers are trained in the course of a run.
    """

    scheduled: ClassVar[bool] = True
    reselects: ClassVar[bool] = False

    def init(self, trainable: Any) -> Any:
        """The state at the start, float32 unless it says otherwise, for the arrays of a plan."""
        ...

    def point(self, trainable: Any, moments: Any, hyperparameters: Any) -> Any:
        """Where the gradient is taken: at the parameters themselves, unless the optimizer steps aside."""
        return trainable

    def apply(
        self,
        gradients: Any,
        moments: Any,
        trainable: Any,
        learning_rate: Any,
        hyperparameters: Any,
        loss: Any = None,
    ) -> tuple[Any, Any, Any]:
        """One step.

        Args:
          gradients: of the mean loss, congruent with ``trainable``.
          moments: as :meth:`init` made them, or the last call returned them.
          trainable: float32 parameters.
          learning_rate: of this step.
          hyperparameters: float32 scalars by dotted key: the section's own below ``optimizer.``, and the rules'.
          loss: of this step, for those that ask for it.

        Returns:
          The new parameters, the new state, and the gradients' norm before clipping.
        """
        ...

    def reselect(self, moments: Any, places: Any) -> Any:
        """The state where trained arrays have become those of other layers, if it ``reselects``.

        Args:
          moments: before.
          places: of arrays that have, by store and path: for each entry of the first axis the one before it that it is,
            int32; -1 for a new one.
        """
        raise ValueError(f"{type(self).__name__} keeps no state of single layers")

    def shardings(self, trainable: Any, mesh: Any) -> Any:
        """How the state is cut over the mesh, given shapes and dtypes of what is trained."""
        ...
