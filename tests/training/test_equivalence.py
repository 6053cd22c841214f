"""Different ways to compute one step give one loss path, through the real command."""

import socket

import numpy as np
import pytest

from jaxtune.telemetry.writers import read_metrics
from tests.tiny_task import command, configuration, finish

# No validation: only the path of the training losses counts here.
COMMON = ("data.validation=null", "data.test=null")


def path_of(run_dir):
    """Loss, gradient norm, weight and number of tokens of each of the 20 steps."""
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 21))
    return {name: np.array([each[name] for each in records]) for name in ("loss", "grad_norm", "weight", "tokens")}


def assert_one_path(found, plain):
    np.testing.assert_allclose(found["loss"], plain["loss"], rtol=1e-5)
    # AdamW hardly sees a gradient's size, so the losses alone would not tell of one that is too large or too small.
    np.testing.assert_allclose(found["grad_norm"], plain["grad_norm"], rtol=1e-4)
    for name in ("weight", "tokens"):
        np.testing.assert_array_equal(found[name], plain[name])


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_model, rows):
    """The path of one device with whole batches of eight."""
    directory = tmp_path_factory.mktemp("plain")
    file = directory / "run.yaml"
    file.write_text(configuration(directory / "run", tiny_model, rows))
    finish(command("train", file, *COMMON))
    return path_of(directory / "run")


def test_the_path_tells_steps_apart(plain):
    """What the comparisons below rest on: other batches, other weights, and parameters that move."""
    assert len(set(plain["loss"])) == 20
    assert len(set(plain["weight"])) > 1
    # Eight batches are an epoch of 64 examples; the second pass over them goes better by more than the tolerance.
    first, second = (
        np.average(plain["loss"][part], weights=plain["weight"][part]) for part in (np.s_[:8], np.s_[8:16])
    )
    assert first - second > 1e-4 * first


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        pytest.param(["train.accumulate=8"], 1, id="one row, accumulated eight times"),
        pytest.param(["data.packing=true", "train.batch_size=4", "train.sequence_length=16"], 1, id="packed"),
        pytest.param(["parallel.data=2", "parallel.fsdp=2", "parallel.tensor=2"], 8, id="eight devices"),
        pytest.param(["kernels=interpret"], 1, id="Pallas kernels", marks=pytest.mark.slow),
        pytest.param(
            ["kernels=interpret", "model.remat=dots", "parallel.data=2", "parallel.fsdp=2", "parallel.tensor=2"],
            8,
            id="Pallas kernels on eight devices",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_loss_path(plain, config_file, tmp_path, overrides, devices):
    finish(command("train", config_file, *COMMON, *overrides, devices=devices))
    assert_one_path(path_of(tmp_path / "run"), plain)


def test_two_processes_give_the_same_path(plain, config_file, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [command("train", config_file, *COMMON, processes=(index, 2, port)) for index in range(2)]
    for process in both:
        finish(process)
    assert_one_path(path_of(tmp_path / "run"), plain)
