"""Checkpoints: exact, only for the configuration that wrote them, and only whole ones."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.config.training_sections import KeepConfig
from jaxtune.errors import UserError
from jaxtune.training import checkpoints as module
from jaxtune.training.checkpoints import Checkpoints, UnreadableCheckpoint, load_checkpoint
from jaxtune.training.state import TrainState

LOOP = {"data": {"row": 3, "nested": {"epoch": 1}}, "best": None, "misses": 0, "evaluation": {}}


def state_of(step=7, value=1.0, width=3, dtype=jnp.float32, **more):
    trainable = {"low_rank": {"q": {"a": jnp.full((4, width), value, dtype)}}, "full": {}}
    return TrainState(step=jnp.int32(step), trainable=trainable | more, moments=(jnp.zeros(2),), seed=jnp.uint32(5))


@pytest.fixture
def opened(tmp_path):
    """Opens the same folder anew, as another process would."""
    every = []

    def make():
        every.append(Checkpoints(tmp_path / "checkpoints"))
        return every[-1]

    yield make
    for each in every:
        each.close()


def test_arrays_shardings_and_the_loop_s_record_come_back_as_they_were(opened, mesh):
    spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
    values = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    state = TrainState(
        step=jnp.int32(2),
        trainable={"w": jax.device_put(values, spread), "empty": {}},
        moments=(jnp.array([np.nan, np.inf, -0.0, 1e-40], jnp.float32),),
        seed=jnp.uint32(2**32 - 1),
    )
    checkpoints = opened()
    checkpoints.save(2, state, LOOP, score=0.5)
    checkpoints.wait()
    restored, loop = opened().restore(2, jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert restored.moments[0].tobytes() == state.moments[0].tobytes()
    assert restored.trainable["w"].sharding == spread
    assert loop == LOOP


@pytest.mark.parametrize(
    "transformation",
    [
        optax.adamw(optax.linear_schedule(1e-2, 0.0, 8)),  # a part without a state between two that have one
        optax.MultiSteps(optax.adamw(optax.linear_schedule(1e-2, 0.0, 8)), 3).gradient_transformation(),
        optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(1e-2)),
        optax.multi_transform({"x": optax.masked(optax.adam(1e-2), {"w": False}), "y": optax.sgd(0.1)}, {"w": "x"}),
    ],
    ids=["adamw with a schedule", "many steps", "random keys", "masked"],
)
def test_the_state_of_an_optax_transformation_comes_back_as_it_was(opened, transformation):
    trainable = {"w": jnp.arange(6.0).reshape(2, 3)}
    _, moments = transformation.update(trainable, transformation.init(trainable), trainable)
    state = TrainState(step=jnp.int32(1), trainable=trainable, moments=moments, seed=jnp.uint32(5))
    checkpoints = opened()
    checkpoints.save(1, state)
    checkpoints.wait()
    like = dataclasses.replace(state, moments=transformation.init(trainable))
    restored, _ = opened().restore(1, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(*(np.asarray(_bits(array)) for array in (found, wanted)))


def _bits(array):
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array


def test_the_state_of_the_call_is_written_whatever_happens_to_it_next(opened):
    """Saving is asynchronous, but the step that follows may reuse the buffers."""
    checkpoints, state = opened(), state_of(value=3.0)
    checkpoints.save(1, state, LOOP)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    restored, _ = checkpoints.restore(1, state_of())
    np.testing.assert_array_equal(restored.trainable["low_rank"]["q"]["a"], 3.0)


def test_the_last_two_and_the_best_are_kept_across_processes(opened, tmp_path):
    checkpoints = opened()
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")), (5, None)):
        checkpoints.save(step, state_of(step), LOOP, score)
    checkpoints.wait()
    assert (checkpoints.latest_step, checkpoints.best_step) == (5, 2)
    assert {item.name for item in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "5"}
    later = opened()
    assert (later.latest_step, later.best_step) == (5, 2)
    later.save(6, state_of(6), LOOP, 0.5)
    later.wait()
    assert {item.name for item in (tmp_path / "checkpoints").iterdir()} == {"5", "6"}
    assert (later.latest_step, later.best_step) == (6, 6)


def test_without_a_score_there_is_no_best_and_only_the_last_two_are_kept(opened, tmp_path):
    checkpoints = opened()
    assert (checkpoints.latest_step, checkpoints.best_step) == (None, None)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), LOOP)
    checkpoints.wait()
    assert (checkpoints.latest_step, checkpoints.best_step) == (3, None)
    assert {item.name for item in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"latest": 1}, {"3", "7"}),
        ({"latest": 3, "best": 2}, {"3", "4", "5", "6", "7"}),
        ({"latest": 1, "every": 3}, {"3", "6", "7"}),
    ],
)
def test_what_is_kept_is_configured(tmp_path, keep, left):
    checkpoints = Checkpoints(tmp_path, keep=KeepConfig(**keep))
    for step, score in enumerate((9.0, 8.0, 1.0, 2.0, 7.0, 6.0, 5.0), start=1):
        checkpoints.save(step, state_of(step), LOOP, score)
    checkpoints.close()
    assert {item.name for item in tmp_path.iterdir()} == left


DAMAGE = {
    "arrays": "state/**/d/*",
    "index": "state/manifest.ocdbt",
    "shapes": "state/_METADATA",
    "loop": "loop/metadata",
}


def damage(folder, which, how):
    """Cuts the files of a checkpoint off in the middle, or removes them."""
    files = list(folder.glob(DAMAGE[which]))
    assert files
    for file in files:
        if how == "missing":
            file.unlink()
        else:
            os.truncate(file, file.stat().st_size // 2)


def saved(folder, steps=(1, 2, 3), scores=(0.5, 0.75, 0.25)):
    """A folder of checkpoints as a run of the past has left it."""
    checkpoints = Checkpoints(folder, keep=KeepConfig(latest=len(steps)))
    for step, score in zip(steps, scores, strict=True):
        checkpoints.save(step, state_of(step, value=float(step)), LOOP, score)
    checkpoints.close()


@pytest.mark.parametrize("how", ["cut off", "missing"])
@pytest.mark.parametrize("which", DAMAGE)
def test_a_damaged_checkpoint_is_left_for_the_one_before(opened, tmp_path, caplog, which, how):
    folder = tmp_path / "checkpoints"
    saved(folder)
    damage(folder / "3", which, how)
    before = _whole(folder)
    for asked, step in (("latest", 2), ("best", 1)):
        caplog.clear()
        found, state = load_checkpoint(folder, state_of(), asked)
        assert (found, int(state.step), float(state.trainable["low_rank"]["q"]["a"].max())) == (step, step, step)
        (told,) = caplog.messages
        assert told.startswith(f"{folder / '3'}: a damaged checkpoint (")
        assert told.endswith(f"step {step} is taken instead")
        assert len(told) < len(str(folder)) + 220
        assert "\n" not in told
    with pytest.raises(UnreadableCheckpoint, match="a damaged checkpoint"):
        load_checkpoint(folder, state_of(), "latest", fall_back=False)
    assert _whole(folder) == before

    caplog.clear()
    checkpoints = opened()
    step, state, loop = checkpoints.resume(state_of())
    assert (step, int(state.step), loop) == (2, 2, LOOP)
    (told,) = caplog.messages
    assert told.endswith("it is now 3.damaged, and the run goes on from step 2")
    # What is trained again takes the place of what was damaged.
    assert (checkpoints.latest_step, checkpoints.best_step) == (2, 1)
    checkpoints.save(3, state_of(3, value=4.0), LOOP, 0.125)
    assert float(checkpoints.restore(3, state_of())[0].trainable["low_rank"]["q"]["a"].max()) == 4.0
    again = opened()
    assert (again.latest_step, again.best_step) == (3, 3)


def test_where_no_checkpoint_can_be_read_all_are_named_and_stay(opened, tmp_path):
    folder = tmp_path / "checkpoints"
    saved(folder)
    for step, which in ((1, "arrays"), (2, "loop"), (3, "index")):
        damage(folder / str(step), which, "cut off")
    for read in (lambda: load_checkpoint(folder, state_of(), "best"), lambda: opened().resume(state_of())):
        with pytest.raises(UserError, match="none of the checkpoints can be read") as error:
            read()
        assert all(f"{folder / str(step)}: a damaged checkpoint" in str(error.value) for step in (1, 2, 3))
    assert {item.name for item in folder.iterdir()} == {"1", "2", "3"}


def test_a_score_that_cannot_be_read_is_none(opened, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    saved(folder)
    os.truncate(folder / "3" / "metrics" / "metrics", 5)
    assert load_checkpoint(folder, state_of(), "best")[0] == 1
    assert caplog.messages == [f"{folder / '3'}: a damaged checkpoint, whose score is lost"]
    checkpoints = opened()
    assert (checkpoints.latest_step, checkpoints.best_step) == (3, 1)
    assert checkpoints.resume(state_of())[0] == 2


def test_another_configuration_is_no_damage(opened, tmp_path):
    saved(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="another configuration"):
        opened().resume(state_of(width=5))
    assert opened().latest_step == 3


def test_a_step_that_is_there_is_not_written_again(opened):
    checkpoints = opened()
    checkpoints.save(1, state_of(value=1.0), LOOP)
    checkpoints.save(1, state_of(value=2.0), LOOP)
    restored, _ = checkpoints.restore(1, state_of())
    np.testing.assert_array_equal(restored.trainable["low_rank"]["q"]["a"], 1.0)


def test_another_configuration_s_checkpoint_is_refused_with_everything_that_differs(opened):
    checkpoints = opened()
    checkpoints.save(1, state_of(gone=jnp.zeros(2)), LOOP)
    with pytest.raises(UserError) as error:
        checkpoints.restore(1, state_of(width=5, extra=jnp.zeros(3), further={"x": jnp.zeros(1)}))
    lines = str(error.value).splitlines()
    assert "a checkpoint of another configuration" in lines[0]
    assert lines[0].split(":")[0].endswith("checkpoints/1")
    assert [line.strip() for line in lines[1:]] == [
        "['trainable']['extra'] is missing",
        "['trainable']['further']['x'] is missing",
        "['trainable']['gone'] is not expected",
        "['trainable']['low_rank']['q']['a'] is float32[4, 3], this configuration makes float32[4, 5]",
    ]


def test_another_dtype_is_refused_though_orbax_would_cast_it(opened):
    checkpoints = opened()
    checkpoints.save(1, state_of(), LOOP)
    with pytest.raises(UserError, match=r"\['a'\] is float32\[4, 3\], this configuration makes bfloat16\[4, 3\]"):
        checkpoints.restore(1, state_of(dtype=jnp.bfloat16))


def test_many_differences_are_counted(opened):
    checkpoints = opened()
    checkpoints.save(1, state_of(), LOOP)
    with pytest.raises(UserError, match="and 10 more"):
        checkpoints.restore(1, state_of(**{f"p{index:02}": jnp.zeros(1) for index in range(30)}))


def test_a_torn_checkpoint_is_ignored_and_cleared_away(opened, tmp_path):
    checkpoints = opened()
    checkpoints.save(3, state_of(3), LOOP, 1.0)
    checkpoints.wait()
    folder = tmp_path / "checkpoints"
    # What Orbax leaves when it is killed while it writes: the folder has its final name only once it is whole.
    torn = folder / "9.orbax-checkpoint-tmp"
    shutil.copytree(folder / "3", torn)
    (torn / "_CHECKPOINT_METADATA").unlink()
    later = opened()
    assert (later.latest_step, later.best_step) == (3, 3)
    restored, _ = later.restore(3, state_of())
    assert int(restored.step) == 3
    later.save(9, state_of(9), LOOP)
    later.wait()
    assert later.latest_step == 9
    assert not torn.exists()


def test_a_full_disk_is_an_error_of_the_system(opened, monkeypatch):
    """The command line then says that it goes on once there is room, as for any other file."""
    checkpoints = opened()
    checkpoints.save(1, state_of(1), LOOP)
    checkpoints.wait()
    # What Orbax raises where a disk is full, as seen on one of 300 KiB.
    message = "RESOURCE_EXHAUSTED: Error writing: Failed to write 9 bytes: No space left on device [os_error_code='28']"

    def fail(*_, **__):
        raise ValueError(message)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints._manager, "wait_until_finished", fail)
        with pytest.raises(OSError, match="No space left") as raised:
            checkpoints.wait()
        assert raised.value.errno == errno.ENOSPC
        patched.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(2, state_of(2), LOOP)
        message = "something else"
        with pytest.raises(ValueError, match="something else"):
            checkpoints.wait()
    assert opened().latest_step == 1


def _whole(folder):
    """Everything below a folder: names, contents, times."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def test_a_reader_changes_nothing(opened, tmp_path):
    """What another process is writing looks like what a process that was killed has left."""
    checkpoints = opened()
    for step, score in ((1, 0.5), (2, 0.75)):
        checkpoints.save(step, state_of(step, value=float(step)), LOOP, score)
    checkpoints.wait()
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    before = _whole(folder)
    for which, step in (("best", 1), ("latest", 2)):
        found, state = load_checkpoint(folder, state_of(), which)
        assert (found, int(state.step)) == (step, step)
    with pytest.raises(UserError, match="another configuration"):
        load_checkpoint(folder, state_of(width=5), "best")
    assert _whole(folder) == before
    assert load_checkpoint(tmp_path / "none", state_of(), "best") is None
    assert (Checkpoints.newest_on_disk(folder), Checkpoints.newest_on_disk(tmp_path / "none")) == (2, 0)
    assert not (tmp_path / "none").exists()


def test_readers_beside_a_writer_read_whole_checkpoints(opened, tmp_path):
    """Every checkpoint takes the place of the one before it, while it is read."""
    checkpoints, read, failed = opened(), [], []

    def follow():
        try:
            while not (read and read[-1][0] == 12):
                found = load_checkpoint(tmp_path / "checkpoints", state_of(), "best")
                if found is not None:
                    read.append((found[0], int(found[1].step), float(found[1].trainable["low_rank"]["q"]["a"].min())))
        except Exception as error:
            failed.append(error)

    reader = threading.Thread(target=follow)
    reader.start()
    for step in range(1, 13):
        checkpoints.save(step, state_of(step, value=float(step)), LOOP, 1.0 / step)
    checkpoints.wait()
    reader.join(timeout=60)
    assert not failed
    assert read[-1] == (12, 12, 12.0)
    assert all(found == step == value for found, step, value in read), read


def test_a_reader_steps_over_to_what_replaced_a_checkpoint(opened, tmp_path, monkeypatch):
    folder, whole = tmp_path / "checkpoints", module._load
    checkpoints = opened()
    checkpoints.save(1, state_of(1), LOOP)
    checkpoints.wait()

    def replaced(*arguments):
        monkeypatch.setattr(module, "_load", whole)
        writer = opened()
        writer.save(2, state_of(2), LOOP)
        writer.wait()
        shutil.rmtree(folder / "1", ignore_errors=True)
        return 1, state_of(value=0.0)

    monkeypatch.setattr(module, "_load", replaced)
    found = load_checkpoint(folder, state_of(), "best")
    assert found is not None
    assert (found[0], int(found[1].step)) == (2, 2)


@pytest.mark.parametrize("name", ["t[1]", "a\\b", "q?", "st*r", "logs:", os.fsdecode(b"latin-\xff")])
def test_any_folder_s_name_will_do(tmp_path, name):
    """Orbax takes some for patterns and addresses; it would write there and find nothing again."""
    folder = tmp_path / name / "checkpoints"
    writer = Checkpoints(folder)
    writer.save(1, state_of(1, value=2.0), LOOP, 0.5)
    writer.close()
    (tmp_path / name).rename(tmp_path / f"{name} moved")
    folder = tmp_path / f"{name} moved" / "checkpoints"
    again = Checkpoints(folder)
    restored, loop = again.restore(1, state_of())
    again.close()
    np.testing.assert_array_equal(restored.trainable["low_rank"]["q"]["a"], 2.0)
    assert loop == LOOP
    assert load_checkpoint(folder, state_of(), "best")[0] == 1
    assert [entry.name for entry in folder.iterdir()] == ["1"]
