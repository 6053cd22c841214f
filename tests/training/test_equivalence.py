"""Different ways to compute one step give one loss path, through the real command."""

import socket

import numpy as np
import pytest

from jaxtune.telemetry.writers import read_metrics
from tests.tiny_task import command, configuration, finish

# No validation: only the path of the training losses counts here.
COMMON = ("data.validation=null", "data.test=null")


def losses(run_dir):
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 21))
    return np.array([record["loss"] for record in records])


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_model, rows):
    """The path of one device with whole batches of eight."""
    directory = tmp_path_factory.mktemp("plain")
    file = directory / "run.yaml"
    file.write_text(configuration(directory / "run", tiny_model, rows))
    finish(command("train", file, *COMMON))
    return losses(directory / "run")


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        pytest.param(["train.accumulate=8"], 1, id="one row, accumulated eight times"),
        pytest.param(["data.packing=true", "train.batch_size=4", "train.sequence_length=16"], 1, id="packed"),
        pytest.param(["parallel.data=2", "parallel.fsdp=2", "parallel.tensor=2"], 8, id="eight devices"),
    ],
)
def test_one_loss_path(plain, config_file, tmp_path, overrides, devices):
    finish(command("train", config_file, *COMMON, *overrides, devices=devices))
    np.testing.assert_allclose(losses(tmp_path / "run"), plain, rtol=1e-5)
    assert plain[-1] != plain[0]


def test_two_processes_give_the_same_path(plain, config_file, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [command("train", config_file, *COMMON, processes=(index, 2, port)) for index in range(2)]
    for process in both:
        finish(process)
    np.testing.assert_allclose(losses(tmp_path / "run"), plain, rtol=1e-5)
