"""Checkpoints of what is trained: asynchronous, atomic, the last and the best kept."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxtune.errors import UserError

PyTree = Any

# Orbax takes parts of a path for patterns and addresses, and writes what it does not find again. Lone surrogates stand
# for bytes that are no UTF-8.
_MISREAD = re.compile(r"[*?\[\\\ud800-\udfff]|gs:/")

_REPLACED_SECONDS, _PAUSE_SECONDS = 60.0, 0.05
"""How long, and how often, a reader tries again while a run replaces the checkpoints under it."""


class Checkpoints:
    """The ``checkpoints/`` folder of a run.

    Each checkpoint holds the trainable state (Orbax, sharded) and a JSON record (data position and the loop's own
    state). The base model is referenced by the run's configuration, never copied.

    Args:
      directory: the folder; made if it is missing.
      read_only: neither write nor remove anything, what another process is writing included; nothing is made. Otherwise
        no other process may have the folder open for writing.
    """

    def __init__(self, directory: str | Path, *, read_only: bool = False):
        # Orbax tells of every save on the root logger's absl child; a run prints its own line. What goes wrong there is
        # raised here as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = Path(directory).absolute()
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(1),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics["score"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._alias: tempfile.TemporaryDirectory[str] | None = None
        self._manager = ocp.CheckpointManager(
            self._plain_path(read_only),
            # Orbax writes the scores to disk only where it is told of a best_fn; what is kept is the policy's choice.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                best_fn=lambda metrics: metrics["score"],
                best_mode="min",
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                **({"create": False, "save_interval_steps": 0} if read_only else {}),
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "loop": ocp.JsonCheckpointHandler()},
        )

    def _plain_path(self, read_only: bool) -> Path:
        """The folder by a name that Orbax reads as it stands."""
        if not _MISREAD.search(str(self.directory)):
            return self.directory
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._alias = tempfile.TemporaryDirectory(prefix="jaxtune-")
        link = Path(self._alias.name) / "checkpoints"
        link.symlink_to(self.directory)
        return link

    def save(self, step: int, state: PyTree, loop: dict[str, Any], score: float | None = None) -> None:
        """Starts writing a checkpoint; returns once the arrays are copied from the device.

        Args:
          step: optimizer steps done.
          state: arrays.
          loop: JSON-able record of the loop: data position, early-stopping count.
          score: validation score, lower is better; the best one is kept.

        Raises:
          OSError: the disk is full, now or in the save before; the checkpoints before are whole.
        """
        if step in self._manager.all_steps():
            return
        with self._full_disk():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(loop)),
                metrics=None if score is None or not math.isfinite(score) else {"score": score},
            )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the best score, or None if none was scored."""
        scores = self._scores()
        return min(scores, key=lambda step: (scores[step], step)) if scores else None

    @property
    def best_score(self) -> float | None:
        """The score of the checkpoint at :attr:`best_step`, or None if none was scored."""
        return min(self._scores().values(), default=None)

    def _scores(self) -> dict[int, float]:
        found = ((step, self._manager.metrics(step)) for step in self._manager.all_steps())
        return {step: metrics["score"] for step, metrics in found if metrics}

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads a checkpoint into the shapes, dtypes and shardings of ``like``.

        Raises:
          UserError: the checkpoint holds other arrays (another configuration); all differences are listed. Orbax by
            itself would cast another dtype without a word.
        """
        self._manager.wait_until_finished()
        self._check(step, like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), loop=ocp.args.JsonRestore())
        )
        return restored["state"], restored["loop"]

    def _check(self, step: int, like: PyTree) -> None:
        saved = self._manager.item_metadata(step)["state"]
        tree = getattr(saved, "tree", saved)
        found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(_plain(tree))}
        wanted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(_plain(like))}
        problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
        problems += [f"{name} is not expected" for name in sorted(found.keys() - wanted.keys())]
        for name in sorted(wanted.keys() & found.keys()):
            one, other = found[name], wanted[name]
            if tuple(one.shape) != tuple(other.shape) or one.dtype != other.dtype:
                problems.append(
                    f"{name} is {one.dtype}{list(one.shape)}, this configuration makes {other.dtype}{list(other.shape)}"
                )
        if problems:
            listed = "\n  ".join(problems[:20]) + (f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else "")
            raise UserError(f"{self.directory / str(step)}: a checkpoint of another configuration:\n  {listed}")

    def wait(self) -> None:
        """Blocks until all checkpoints are on disk.

        Raises:
          OSError: the disk is full; the checkpoints before are whole.
        """
        with self._full_disk():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the writer.

        Raises:
          OSError: the disk is full; the checkpoints before are whole.
        """
        self.wait()
        self._manager.close()
        if self._alias is not None:
            self._alias.cleanup()

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        """Orbax's storage reports a full disk as a ``ValueError`` that quotes the system's error number."""
        try:
            yield
        except ValueError as error:
            if f"os_error_code='{errno.ENOSPC}'" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory)) from error


def load_checkpoint(directory: str | Path, like: PyTree, which: Literal["best", "latest"]) -> tuple[int, PyTree] | None:
    """Reads the best or the newest checkpoint of a folder that a run may be writing to, and changes nothing in it.

    A checkpoint that is replaced while it is read is left for the one that took its place.

    Args:
      directory: the ``checkpoints/`` folder.
      like: shapes, dtypes and shardings of the state.
      which: ``best`` takes the newest one where none was scored.

    Returns:
      The step and the state; None where no checkpoint was finished.

    Raises:
      UserError: the checkpoint holds other arrays (another configuration), or a run replaces its checkpoints faster
        than they can be read.
    """
    folder, end, seen = Path(directory), time.monotonic() + _REPLACED_SECONDS, False
    while True:
        before = _files(folder)
        seen = seen or bool(before)
        try:
            found = _load(folder, like, which)
        except Exception:
            if _files(folder) == before:
                raise
        else:
            if found is None and not seen:
                return None
            # Half removed, a checkpoint can still be read: what is gone is zeros.
            if found is not None and before.get(found[0]) == _files(folder).get(found[0]):
                return found
        if time.monotonic() > end:
            raise UserError(f"{folder}: a run replaces its checkpoints faster than they can be read; try again later")
        time.sleep(_PAUSE_SECONDS)


def _load(folder: Path, like: PyTree, which: Literal["best", "latest"]) -> tuple[int, PyTree] | None:
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        step = checkpoints.best_step if which == "best" else None
        step = checkpoints.latest_step if step is None else step
        return None if step is None else (step, checkpoints.restore(step, like)[0])
    finally:
        checkpoints.close()


def newest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint in a folder, 0 before the first; unfinished ones have other names."""
    return max(_files(folder), default=0)


def _files(folder: Path) -> dict[int, frozenset[str]]:
    """The files of each whole checkpoint in a folder, by step."""
    steps = [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]
    return {
        step: frozenset(os.path.join(place, name) for place, _, names in os.walk(folder / str(step)) for name in names)
        for step in steps
    }


def _plain(tree: PyTree) -> PyTree:
    """The tree as Orbax names it: dataclasses and named tuples become dictionaries."""
    return ocp.tree.serialize_tree(tree, keep_empty_nodes=False)
