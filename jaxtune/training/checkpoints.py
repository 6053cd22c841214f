"""Checkpoints of what is trained: asynchronous, atomic, the last ones and the best kept."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jaxtune.config.training_sections import KeepConfig
from jaxtune.errors import UserError
from jaxtune.layout import CHECKPOINTS_FOLDER
from jaxtune.parallel.distributed import is_writer
from jaxtune.training.state import check_alive
from jaxtune.training.storage import quiet_storage, system_errors

PyTree = Any

logger = logging.getLogger(__name__)

# Orbax takes parts of a path for patterns and addresses, and writes what it does not find again. Lone surrogates stand
# for bytes that are no UTF-8.
_MISREAD = re.compile(r"[*?\[\\\ud800-\udfff]|gs:/")

_REPLACED_SECONDS, _PAUSE_SECONDS = 60.0, 0.05
"""How long, and how often, a reader tries again while a run replaces the checkpoints under it."""


class UnreadableCheckpoint(UserError):
    """A checkpoint's files are damaged: some are cut off or missing.

    Attributes:
      step: of the checkpoint.
    """

    def __init__(self, folder: Path, step: int, error: Exception):
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # Of its own words the storage of the arrays tells the kind first, and then where in its files.
        if kind := re.match(r"([A-Z]+(?:_[A-Z]+)*): ", reason):
            reason = f"arrays: {kind[1].lower().replace('_', ' ')}"
        super().__init__(f"{folder / str(step)}: a damaged checkpoint ({reason[:160]})")
        self.step = step


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, for which a score that cannot be read is none: it reads those of all steps to open a folder."""

    def metrics(self, step: int) -> PyTree | None:
        """The scores of a step."""
        try:
            return super().metrics(step)
        except (ValueError, OSError):
            _tell_lost_score(str(self.directory / str(step)))
            return None


@functools.cache
def _tell_lost_score(checkpoint: str) -> None:
    """Once in a process: a score is read often."""
    logger.warning("%s: a damaged checkpoint, whose score is lost", checkpoint)


def load_checkpoint(
    directory: str | Path, like: PyTree, which: Literal["best", "latest"], *, fall_back: bool = True
) -> tuple[int, PyTree] | None:
    """Reads the best or the newest checkpoint of a folder that a run may be writing to, and changes nothing in it.

    A checkpoint that is replaced while it is read is left for the one that took its place. A damaged one is left
    for the best, or the newest, of the others, which is told.

    Args:
      directory: the ``checkpoints/`` folder.
      like: shapes, dtypes and shardings of the state.
      which: ``best`` takes the newest one where none was scored.
      fall_back: whether another one will do where that one is damaged.

    Returns:
      The step and the state; None where no checkpoint was finished.

    Raises:
      UserError: the checkpoint holds other arrays (another configuration), none can be read, or a run replaces its
        checkpoints faster than they can be read.
      UnreadableCheckpoint: it is damaged, and no other will do.
    """
    folder, end, seen = Path(directory), time.monotonic() + _REPLACED_SECONDS, False
    damaged: dict[int, UnreadableCheckpoint] = {}
    while True:
        before = _files(folder)
        seen = seen or bool(before)
        try:
            found = _load(folder, like, which, damaged)
        except UnreadableCheckpoint as error:
            if _files(folder) == before:
                if not fall_back:
                    raise
                damaged[error.step] = error
                continue
        except Exception:
            if _files(folder) == before:
                raise
        else:
            if found is None and not seen:
                return None
            # Half removed, a checkpoint can still be read: what is gone is zeros.
            if found is not None and before.get(found[0]) == _files(folder).get(found[0]):
                for error in damaged.values():
                    logger.warning("%s; step %d is taken instead", error, found[0])
                return found
        if time.monotonic() > end:
            raise UserError(f"{folder}: a run replaces its checkpoints faster than they can be read; try again later")
        time.sleep(_PAUSE_SECONDS)


class Checkpoints:
    """The ``checkpoints/`` folder of a run.

    Each checkpoint holds the trainable state (Orbax, sharded) and a JSON record (data position and the loop's own
    state). The base model is referenced by the run's configuration, never copied.

    Args:
      directory: the folder; made if it is missing.
      read_only: neither write nor remove anything, what another process is writing included; nothing is made. Otherwise
        no other process may have the folder open for writing.
      keep: which checkpoints stay; the default of the configuration's ``train.keep``, if None.
    """

    def __init__(self, directory: str | Path, *, read_only: bool = False, keep: KeepConfig | None = None):
        quiet_storage()
        self.directory = Path(directory).absolute()
        self._alias: tempfile.TemporaryDirectory[str] | None = None
        self._manager = _Manager(
            self._plain_path(read_only),
            # Orbax writes the scores to disk only where it is told of a best_fn; what is kept is the policy's choice.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_policy(keep or KeepConfig()),
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
        link = Path(self._alias.name) / CHECKPOINTS_FOLDER
        link.symlink_to(self.directory)
        return link

    def save(self, step: int, state: PyTree, loop: dict[str, Any] | None = None, score: float | None = None) -> None:
        """Starts writing a checkpoint; returns once the arrays are copied from the device.

        Args:
          step: optimizer steps done.
          state: arrays.
          loop: JSON-able record of the loop: data position, early-stopping count; empty by default.
          score: validation score, lower is better; the best one is kept.

        Raises:
          UserError: a step has used the state up.
          OSError: the disk is full, now or in the save before; the checkpoints before are whole.
        """
        if step in self._manager.all_steps():
            return
        check_alive(state)
        with system_errors(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(loop or {})),
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

    def choose(self, which: Literal["best", "latest"], without: Collection[int] = ()) -> int | None:
        """The step of the best or the newest checkpoint, some left out; where none was scored, the newest is best."""
        scores = self._scores() if which == "best" else {}
        scored = sorted((step for step in scores if step not in without), key=lambda step: (scores[step], step))
        return next((step for step in (*scored, *self._newest_first()) if step not in without), None)

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
          UnreadableCheckpoint: files of it are cut off or missing.
        """
        self.wait()
        try:
            self._check(step, like)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), loop=ocp.args.JsonRestore())
            )
            return restored["state"], restored["loop"]
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            # Orbax passes on whatever its readers of JSON, of arrays and of files raise.
            raise UnreadableCheckpoint(self.directory, step, error) from error

    def resume(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint that can be read; damaged newer ones are renamed, and it is told.

        Several processes take the same one.

        Args:
          like: as for :meth:`restore`.

        Returns:
          Its step, its state and its record of the loop; None where there is no checkpoint.

        Raises:
          UserError: as :meth:`restore`, or none of the checkpoints can be read.
        """
        damaged: list[UnreadableCheckpoint] = []
        for step in self._newest_first():
            restored, failure = None, UnreadableCheckpoint(self.directory, step, OSError("to another process"))
            try:
                restored = self.restore(step, like)
            except UnreadableCheckpoint as error:
                failure = error
            whole = _all_processes(restored is not None)
            if restored is None or not whole:
                damaged.append(failure)
                continue
            for error in damaged:
                aside = self._set_aside(error.step)
                logger.warning("%s; it is now %s, and the run goes on from step %d", error, aside.name, step)
            return step, *restored
        if damaged:
            raise _none_readable(self.directory, damaged)
        return None

    def _newest_first(self) -> list[int]:
        return sorted(self._manager.all_steps(), reverse=True)

    def _set_aside(self, step: int) -> Path:
        """Takes a checkpoint out of those that are counted; Orbax writes none that is older than the newest."""
        folder = self.directory / str(step)
        aside = folder.with_name(f"{step}.damaged")
        if is_writer():
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"jaxtune: {aside.name}")
        self._manager.reload()
        return aside

    def _check(self, step: int, like: PyTree) -> None:
        saved = self._manager.item_metadata(step)["state"]
        if (tree := getattr(saved, "tree", saved)) is None:
            raise FileNotFoundError("the shapes of its arrays are missing")
        found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(_plain(tree))}
        wanted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(_plain(like))}
        problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
        problems += [f"{name} is not expected" for name in sorted(found.keys() - wanted.keys())]
        for name in sorted(wanted.keys() & found.keys()):
            one, other = found[name], _stored(wanted[name])
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
          OSError: the disk is full, or gone; the checkpoints before are whole.
        """
        with system_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the writer.

        Raises:
          OSError: the disk is full, or gone; the checkpoints before are whole.
        """
        self.wait()
        self._manager.close()
        if self._alias is not None:
            self._alias.cleanup()

    load = staticmethod(load_checkpoint)

    @staticmethod
    def newest_on_disk(directory: str | Path) -> int:
        """The step of the newest whole checkpoint in a folder that any process may write, 0 before the first."""
        return max(_files(Path(directory)), default=0)


def _load(
    folder: Path, like: PyTree, which: Literal["best", "latest"], damaged: Mapping[int, UnreadableCheckpoint]
) -> tuple[int, PyTree] | None:
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        step = checkpoints.choose(which, damaged)
        if step is None and damaged:
            raise _none_readable(folder, list(damaged.values()))
        return None if step is None else (step, checkpoints.restore(step, like)[0])
    finally:
        checkpoints.close()


def _none_readable(folder: Path, damaged: Sequence[UnreadableCheckpoint]) -> UserError:
    listed = "\n  ".join(str(error) for error in damaged)
    return UserError(
        f"{folder}: none of the checkpoints can be read:\n  {listed}\nrestore them from a copy, or remove that folder "
        f"and the same command trains from the start"
    )


def _all_processes(whole: bool) -> bool:
    """Whether something holds in all processes."""
    if jax.process_count() == 1:
        return whole
    return bool(np.all(multihost_utils.process_allgather(np.array([whole]))))


def _policy(keep: KeepConfig) -> checkpoint_managers.AnyPreservationPolicy:
    policies: list[checkpoint_managers.PreservationPolicy] = [
        checkpoint_managers.LatestN(keep.latest),
        checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics["score"],
            reverse=True,
            n=keep.best,
            keep_checkpoints_without_metrics=False,
        ),
    ]
    if keep.every is not None:
        policies.append(checkpoint_managers.EveryNSteps(keep.every))
    return checkpoint_managers.AnyPreservationPolicy(policies)


def _files(folder: Path) -> dict[int, frozenset[str]]:
    """The files of each whole checkpoint in a folder, by step; unfinished ones have other names."""
    steps = [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]
    return {
        step: frozenset(os.path.join(place, name) for place, _, names in os.walk(folder / str(step)) for name in names)
        for step in steps
    }


def _stored(array: Any) -> Any:
    """An array as Orbax stores it, who takes random keys apart."""
    random = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, array) if random else array


def _plain(tree: PyTree) -> PyTree:
    """The tree as Orbax names it: dataclasses and named tuples become dictionaries."""
    # Without its empty nodes a sequence would have gaps, as where an optax chain holds a part without a state.
    return ocp.tree.serialize_tree(tree, keep_empty_nodes=True)
