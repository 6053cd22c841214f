"""A step that does not fit the memory is refused before anything of it is there, with the nearest value that fits."""

from __future__ import annotations

import dataclasses
import re
import types

import jax
import pytest

from jaxtune.cli import main
from jaxtune.config import load_config, with_overrides
from jaxtune.data import batch_shapes
from jaxtune.errors import UserError
from jaxtune.parallel import host_memory
from jaxtune.parallel.platform import free_bytes
from jaxtune.search import run as search_run
from jaxtune.search.memory import check_memory
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.training import memory
from jaxtune.training.memory import Size, StepMemory, checked_memory
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.preflight import preflight

FREE = 40 * 2**20
SEARCH = "search={trials: 40, promote: 1, space: {optimizer.learning_rate: {log_uniform: [1e-4, 1e-2]}}}"


@pytest.fixture
def small(monkeypatch):
    """Devices of 40 MiB each."""
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: float(FREE))


@pytest.fixture
def doubled(monkeypatch, small):
    """A compiler that finds as much between a step's arrays as they take themselves."""

    def compiled(self: StepMemory, size: Size) -> dict[str, int]:
        least = self.least(size)
        return {"arguments": least, "temporaries": least, "outputs": 0, "total": 2 * least}

    monkeypatch.setattr(StepMemory, "compiled", compiled)


def refused(call) -> tuple[str, int, int]:
    """Key, value and nearest value of the message."""
    with pytest.raises(UserError) as error:
        call()
    found = re.fullmatch(
        r"(\S+): with ([\d,]+) a training step takes (?:at least )?[\d.,]+ [GM]iB \(an estimate\), and .* have? ?.*"
        r"free; the nearest that fits is about ([\d,]+)",
        str(error.value).replace(" has ", " have "),
    )
    assert found, str(error.value)
    return found[1], *(int(number.replace(",", "")) for number in found.groups()[1:])


def test_the_shapes_of_a_batch_are_those_of_one_and_take_no_memory(config_file):
    opened = OpenedConfig(load_config(config_file))
    batches = opened.batches()
    batch, shapes = next(batches), batch_shapes(8, 8)
    batches.close()
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (array.shape, array.dtype) for name, array in shapes.items()
    }
    huge = batch_shapes(10**9, 4096)["tokens"]
    assert (huge.shape, huge.strides) == ((10**9, 4096), (0, 0))


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["update.0.rank=100000"], "update.0.rank", 100_000),
        ([SEARCH, "search.population=100000"], "search.population", 100_000),
        (
            [SEARCH, "search.space={train.batch_size: {choice: [8, 8000000]}}"],
            "search.space.train.batch_size",
            8_000_000,
        ),
        ([SEARCH, "search.space.update.0.rank={power_of_two: [2, 131072]}"], "search.space.update.0.rank", 131_072),
    ],
)
def test_the_nearest_value_fits_and_not_much_more_would(config_file, monkeypatch, doubled, overrides, key, value):
    config = load_config(config_file, overrides)
    opened = OpenedConfig(config)
    if config.search is None:
        trainer, slots = opened.trainer(), None
        named, given, nearest = refused(lambda: checked_memory(opened, trainer))
    else:
        runner = TrainerRunner(opened)
        if key.endswith("batch_size"):
            runner.trainer(with_overrides(opened.config, {"train.batch_size": value}))
        runner.capacity = config.search.population
        trainer = runner.trainer(opened.config)
        slots = runner.slots_of(trainer)
        named, given, nearest = refused(lambda: check_memory(runner))
    assert (named, given) == (key, value)
    step = StepMemory(opened, trainer, slots)

    def takes(number: int) -> int:
        changed = {"slots": number} if slots != 1 and slots else {"batch_size": number}
        return 2 * step.least(dataclasses.replace(step.size, **changed))

    if key.endswith("rank"):
        # A larger one than the smaller side of the widest matrix adds nothing.
        assert nearest == 32
    elif key == "search.population":
        # There are no more trials.
        assert nearest == 40
        assert takes(40) <= step.free
    else:
        assert takes(nearest) <= step.free < takes(int(nearest * 1.25) // 8 * 8)


def test_a_real_step_of_the_nearest_size_fits(config_file, small):
    opened = OpenedConfig(load_config(config_file, ["train.batch_size=8000000"]))
    _, _, nearest = refused(lambda: checked_memory(opened, opened.trainer()))
    step = StepMemory(opened, opened.trainer())
    size = dataclasses.replace(step.size, batch_size=nearest)
    assert 0.7 * step.free < step.compiled(size)["total"] <= step.free


def test_the_devices_of_other_machines_are_not_judged_by_ours(config_file, doubled):
    runner = TrainerRunner(OpenedConfig(load_config(config_file, [SEARCH, "search.ray_address=auto"])))
    runner.capacity = 100_000
    assert check_memory(runner)["total"] > FREE


def test_what_no_key_helps_is_told(config_file, monkeypatch):
    opened = OpenedConfig(load_config(config_file))
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: 1000.0)
    with pytest.raises(UserError, match=r"lowering one of update\.0\.rank, train\.sequence_length alone is not enough"):
        checked_memory(opened, opened.trainer())


def test_a_base_that_does_not_fit_is_refused_before_anything_is_opened(config_file, monkeypatch):
    config = with_overrides(load_config(config_file), {"data.train": "nowhere.jsonl"})
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: 1000.0)
    for call in (
        lambda: preflight(config),
        lambda: search_run.preflight_search(load_config(config_file, [SEARCH, "data.train=nowhere.jsonl"])),
    ):
        with pytest.raises(UserError, match=r"^model\.path: the parameters of .* take .* spread it over more devices"):
            call()


@pytest.mark.slow
def test_dry_runs_end_with_2(config_file, doubled, capsys):
    for command, key, value in (
        (("train",), "train.batch_size", 8_000_000),
        (("search", SEARCH), "search.population", 1_000_000),
        (("study", "early-score", SEARCH, "search.trials=8"), "train.batch_size", 8_000_000),
        (("study", "data-size", "train.evaluate_every=5"), "train.batch_size", 8_000_000),
    ):
        names = [part for part in command if "=" not in part]
        given = [part for part in command if "=" in part]
        assert main([*names, str(config_file), *given, f"{key}={value}", "--dry-run"]) == 2, command
        assert re.search(rf"{key}: with {value:,} .* nearest that fits", capsys.readouterr().err), command


def test_what_a_machine_or_its_container_has_left(monkeypatch):
    files: dict[str, str] = {}
    monkeypatch.setattr(host_memory, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2 * 2**20))
    assert host_memory.host_free_bytes() == 2 * 2**20
    files |= {f"/sys/fs/cgroup/memory.{name}": text for name, text in (("max", "max\n"), ("current", "5\n"))}
    assert host_memory.host_free_bytes() == 2 * 2**20
    files["/sys/fs/cgroup/memory.max"] = "1000000\n"
    files["/sys/fs/cgroup/memory.stat"] = "file 77\ninactive_file 400000\nanon 3\n"
    files["/sys/fs/cgroup/memory.current"] = "600000\n"
    assert host_memory.host_free_bytes() == 800_000
    # Virtual devices share the machine.
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    assert free_bytes(mesh) == 800_000 / jax.device_count()
