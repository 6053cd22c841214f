"""``jaxtune init``: from an empty folder to a configuration that works there."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from jaxtune.cli import COMMANDS, main
from jaxtune.cli.study import COMMANDS as STUDY_COMMANDS
from jaxtune.config import load_config
from jaxtune.config.packaged import copy_config

CONFIGS = {path.stem: path for path in (Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml")}
# Their model is in the package and their data is generated.
SELF_CONTAINED = {"quickstart", "tfds", "pretrain_nano"}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(capsys, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_lists_every_packaged_configuration_and_what_it_is_for(capsys):
    listed = {row["name"]: row["for"] for row in result(capsys, "init")["configurations"]}
    assert listed.keys() == CONFIGS.keys()
    for name, purpose in listed.items():
        comment = re.sub(r"\n# ?", " ", CONFIGS[name].read_text(encoding="utf-8")).removeprefix("# ")
        assert comment.startswith(purpose)
        assert purpose[-1] in ".?"
    assert main(["init"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in CONFIGS)


def values(tree):
    if isinstance(tree, dict):
        return {key: values(value) for key, value in tree.items()}
    return re.sub(r"^configs/(studies/)?", "", tree) if isinstance(tree, str) else tree


def test_a_copy_of_another_name_is_a_study_of_that_name(capsys, empty_folder):
    (empty_folder / "sub dir").mkdir()
    copied = result(capsys, "init", "quickstart", "sub dir/my.yaml")
    assert shlex.split(copied["next"][1]) == ["jaxtune", "search", "sub dir/my.yaml"]
    assert copied["to_set"] == {}, "what it refers to lies beside it"
    config = load_config(copied["config"])
    assert (config.name, config.directory) == ("my", "runs/my")
    assert (empty_folder / "sub dir" / "product_listings_attributes.json").is_file()
    odd = load_config(result(capsys, "init", "quickstart", "my first try.yml")["config"])
    assert odd.name == "my-first-try"
    assert main(["init", "quickstart", "my"]) == 2
    assert "my: a configuration is a YAML file; name it my.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_copy_is_the_configuration_with_paths_from_where_it_lies(name, empty_folder):
    copied = copy_config(name)
    original, copy = (path.read_text(encoding="utf-8") for path in (CONFIGS[name], copied.config))
    assert values(yaml.safe_load(copy)) == values(yaml.safe_load(original))
    assert "configs/" not in copy
    assert (copied.to_set == {}) == (name in SELF_CONTAINED)
    config = load_config(copied.config)
    explode = config.data.explode
    if explode is not None and explode.schema_path is not None and "/" not in explode.schema_path:
        assert json.loads(Path(explode.schema_path).read_text(encoding="utf-8"))
    # What a comment or the command tells to run is what runs it.
    said = re.search(r"^#   (jaxtune .*\.yaml)$", copy, re.MULTILINE)
    assert said is None or said[1] == copied.command
    assert {path.name for path in empty_folder.iterdir()} == {path.name for path in copied.written}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "tfds"])
def test_what_needs_no_foreign_data_passes_its_dry_run_in_an_empty_folder(name, capsys, empty_folder):
    copied = result(capsys, "init", name)
    assert copied["written"] == [f"{name}.yaml", "product_listings_attributes.json"]
    command, then = (shlex.split(line) for line in copied["next"])
    assert command == [*then, "--dry-run"]
    assert main(command[1:]) == 0
    assert "everything that can be checked before training is in order" in capsys.readouterr().out
    assert {path.name for path in empty_folder.iterdir()} == set(copied["written"])


def test_what_has_to_be_set_is_named(capsys):
    Path("data").mkdir()
    assert main(["init", "hub_model"]) == 0
    assert "data.train.path: data/examples.jsonl" in capsys.readouterr().out
    Path("hub_model.yaml").unlink()
    Path("data/examples.jsonl").write_text("{}\n")
    assert result(capsys, "init", "hub_model")["to_set"] == {}
    assert set(result(capsys, "init", "attribute_extraction")["to_set"]) == {
        "model.path",
        "data.train.path",
        "data.validation.path",
        "data.test.path",
        "data.explode.schema_path",
    }


def test_nothing_is_overwritten(capsys, empty_folder):
    assert main(["init", "quickstart"]) == 0
    Path("quickstart.yaml").write_text("mine")
    assert main(["init", "quickstart"]) == 2
    assert "quickstart.yaml: is there already" in capsys.readouterr().err
    assert Path("quickstart.yaml").read_text() == "mine"
    # What another copy refers to as well is shared, unless it was changed.
    assert result(capsys, "init", "tfds")["kept"] == ["product_listings_attributes.json"]
    Path("tfds.yaml").unlink()
    Path("product_listings_attributes.json").write_text("{}")
    assert main(["init", "tfds"]) == 2
    assert "product_listings_attributes.json: is there already" in capsys.readouterr().err
    assert not Path("tfds.yaml").exists()
    Path("chat.yaml").symlink_to("nowhere")
    assert main(["init", "chat"]) == 2
    assert not Path("nowhere").exists()


def test_the_nearest_name_is_told(capsys, empty_folder):
    assert main(["init", "quick_start"]) == 2
    assert "'quick_start'; did you mean 'quickstart'" in capsys.readouterr().err
    assert not any(empty_folder.iterdir())


MODULES = [f"jaxtune.cli.{name}" for name in COMMANDS if name != "study"]
MODULES += [f"jaxtune.cli.study.{name.replace('-', '_')}" for name in STUDY_COMMANDS]


def test_the_examples_of_help_need_nothing_but_the_package(capsys):
    """Configurations in them are copied first, and their overrides fit; directories are those of other examples."""
    overview = [line.strip() for line in _help(capsys).partition("examples:")[2].splitlines()]
    known, made = {"runs/quickstart"}, set()
    for example in [overview[1], *(importlib.import_module(module).EXAMPLE for module in MODULES), *overview]:
        for command in example.replace("\\\n", " ").split("&&"):
            words = shlex.split(command)
            if words[:2] == ["jaxtune", "init"] and words[2] not in made:
                assert main(words[1:]) == 0
                made.add(words[2])
            for place, word in enumerate(words):
                if word.endswith(".yaml") and not word.startswith("runs/"):
                    config = load_config(word, [key for key in words[place + 1 :] if re.match(r"[\w.]+=", key)])
                    known.add(config.directory)
    directories = {
        match[0]
        for module in MODULES
        for match in re.finditer(r"(?<!=)\bruns/\w+", importlib.import_module(module).EXAMPLE)
    }
    assert directories
    assert directories <= known


def _help(capsys) -> str:
    capsys.readouterr()
    assert main(["--help"]) == 0
    return capsys.readouterr().out
