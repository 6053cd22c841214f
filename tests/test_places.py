"""Places that are nowhere on this machine are refused wherever one is given, with what to type instead."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jax
import pytest

import jaxtune
from jaxtune.cli import main
from jaxtune.config import load_config
from jaxtune.config.data_section import SourceConfig
from jaxtune.config.reference import sections
from jaxtune.data import open_source
from jaxtune.data.messages import read_conversations
from jaxtune.errors import UserError
from jaxtune.files import user_path
from jaxtune.models import load_tokenizer
from jaxtune.remote_paths import local_path
from jaxtune.updates.treatments.low_rank import LowRankRule

YAML = """\
model: {path: jaxtune:nano}
data: {train: rows.jsonl, completion: "{text}", explode: {field: a}}
train: {steps: 10}
search: {space: {optimizer.learning_rate: {log_uniform: [1e-5, 1e-2]}}}
"""
PLACES = [
    "run_dir", "paths_from", "model.path", "model.adapter", "model.tokenizer",
    "data.train", "data.train.path", "data.validation", "data.test",
    "data.explode.schema_path", "search.start_from", "study.output", "study.ablation.search",
]  # fmt: skip


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    return file


@pytest.mark.parametrize(
    "url", ["gs://bucket/a/run", "s3://bucket/a/run", "az://run", "memory://run", "GS:/bucket/run"]
)
def test_no_key_takes_object_storage(config_file, url):
    for key in PLACES:
        with pytest.raises(
            UserError, match=rf"^override {key}={url}: {key}.*: {url}: only paths of this machine.*\./run"
        ):
            load_config(config_file, [f"{key}={url}"])
    tfds = "data.train={path: 'tfds:one', data_dir: '" + url + "'}"
    with pytest.raises(UserError, match=rf"data\.train\.data_dir: {url}: only paths of this machine"):
        load_config(config_file, [tfds])


def test_every_key_that_is_a_place_is_among_them():
    """Whoever adds one says of which type it is."""
    named = set()
    for title, section in sections():
        for name, field in section.model_fields.items():
            if re.search(r"director|folder|file:", field.description or "", re.IGNORECASE) or name.endswith("path"):
                named.add(f"{title.split(':')[0].split(',')[0]}.{name}".lstrip("."))
    # A data set's is tried with its source; the others speak of a directory without being one.
    assert named - set(PLACES) == {"data.train.data_dir", "data.date", "name", "telemetry.tensorboard"}


def test_what_to_type_instead():
    def refusal(path: str) -> str:
        with pytest.raises(UserError) as error:
            local_path(path)
        return str(error.value)

    stored = refusal("gs://bucket/my run")
    commands = re.findall(r"\((gcloud [^)]*)\)", stored)
    assert [shlex.split(command)[:4] for command in commands] == [["gcloud", "storage", "cp", "--recursive"]] * 2
    assert "(curl -L -o t.jsonl 'https://host/a/t.jsonl?x=1'), and give ./t.jsonl" in refusal(
        "https://host/a/t.jsonl?x=1"
    )
    saved = "datasets.load_dataset('owner/name').save_to_disk('name')\", and give ./name"
    for path in ("https://huggingface.co/datasets/owner/name", "hf://datasets/owner/name/tree/main"):
        assert saved in refusal(path)
    assert "(curl" in refusal("https://huggingface.co/datasets/owner/name/resolve/main/train.jsonl")
    assert refusal("https://huggingface.co/owner/name").endswith("named without its address: owner/name")
    assert refusal("file:///data/rows.jsonl").endswith("give the path alone: /data/rows.jsonl")


@pytest.mark.parametrize(
    "path", ["", "-", "a/b:c", "./gs://b", "tfds:ag_news/x", "jaxtune:nano", "C:/a", "meta/llama", "a:"]
)
def test_paths_and_names_stay(path):
    assert local_path(path) == user_path(path) == path


@pytest.mark.parametrize(
    "command",
    [
        "train gs://b/run.yaml",
        "search run.yaml run_dir=gs://b/run --dry-run",
        "export run.yaml --merged gs://b/merged",
        "export run.yaml --peft=s3://b/adapter",
        "evaluate run.yaml --predictions gs://b/p.jsonl",
        "evaluate run.yaml --adapter gs://b/adapter",
        "profile run.yaml --trace gs://b/trace",
        "report gs://b/run",
        "study list gs://b",
        "study status gs://b/run",
        "study extend gs://b/run --no-run",
    ],
)
def test_no_command_makes_a_folder_of_a_url(config_file, capsys, command):
    try:
        code = main(command.split())
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert "only paths of this machine are read and written" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == [config_file]


def test_no_function_makes_a_folder_of_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = jaxtune.load_model("jaxtune:nano", dtype="float32")
    plan = jaxtune.UpdatePlan([LowRankRule(match="layers.0.attention.q", rank=1)])
    trainer = jaxtune.Trainer(model, plan, jaxtune.TrainConfig(steps=1, batch_size=jax.device_count()))
    for call in (
        lambda: jaxtune.load_model("gs://b/model"),
        lambda: load_tokenizer("gs://b/model"),
        lambda: jaxtune.save_model(model, "gs://b/model"),
        lambda: trainer.save_adapter(Path("gs://b/adapter"), trainer.init(), base="jaxtune:nano"),
        lambda: read_conversations("gs://b/talks.json", "messages"),
    ):
        with pytest.raises(UserError, match="only paths of this machine are read and written"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_of_the_hub_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "hf:owner/name", "datasets/owner/name"):
        with pytest.raises(UserError, match=r"^data\.test: .*load_dataset\('owner/name'\)\.save_to_disk\('name'\)"):
            open_source(SourceConfig(path=name), key="data.test")
    # A folder that is there, or the name of a file, is a path with an error in it.
    (tmp_path / "owner").mkdir()
    for name in ("owner/name", "data/train.jsonl", "rows.parquet"):
        with pytest.raises(UserError, match="does not exist") as error:
            open_source(SourceConfig(path=name), key="data.test")
        assert "Hub" not in str(error.value)
