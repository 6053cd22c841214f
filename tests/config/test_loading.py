import math
from pathlib import Path

import pytest

from jaxtune.config import (
    capacities,
    dump_config,
    hyperparameters,
    load_config,
    parse_value,
    program_key,
    with_overrides,
)
from jaxtune.config.aliases import _ALIASES, _by_last_part
from jaxtune.errors import UserError, nearest

YAML = """\
model: {path: somewhere}
data:
  train: rows.jsonl
  completion: "{text}"
train:
  steps: 10
optimizer:
  learning_rate: 1e-3
update:
  - match: "layers.**"
    method: low_rank
    rank: 8
search:
  space:
    optimizer.learning_rate: {log_uniform: [1e-5, 1e-2]}
    update.0.rank: {power_of_two: [4, 64]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def test_numbers_in_scientific_notation_are_numbers(file):
    config = load_config(file)
    assert config.optimizer.learning_rate == 1e-3
    assert config.search.space["optimizer.learning_rate"].log_uniform == (1e-5, 1e-2)
    assert parse_value("1e-4") == 1e-4
    assert parse_value("[1e-4, 2E+3, .5, -1.5e-2]") == [1e-4, 2e3, 0.5, -0.015]
    assert parse_value("1e4x") == "1e4x"
    assert math.isinf(parse_value(".inf"))


def test_answers_that_are_split_cannot_be_scored(file):
    load_config(file, ["data.too_long=split"])
    with pytest.raises(UserError, match=r"data\.too_long: evaluation\.task extraction .*choose truncate or drop"):
        load_config(file, ["data.too_long=split", "evaluation.task=extraction"])


def test_templates_need_no_quotes_in_an_override():
    assert parse_value("{text}") == "{text}"
    assert parse_value("{text} :") == "{text} :"
    assert parse_value("{uniform: [1, 2]}") == {"uniform": [1, 2]}
    assert parse_value("{}") == {}


def test_dump_reads_back_equal(file, tmp_path):
    config = load_config(file, ["train.seed=3", "data.train.limit=5"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_overrides_reach_lists_sources_and_defaults(file, tmp_path):
    config = load_config(
        file, ["update.0.rank=4", "data.train.limit=5", "search.space.update.0.alpha={uniform: [1, 9]}"]
    )
    assert (config.update[0].rank, config.data.train.limit, config.data.train.path) == (4, 5, "rows.jsonl")
    assert config.search.space["update.0.alpha"].uniform == (1, 9)
    without = tmp_path / "without.yaml"
    without.write_text("model: {path: x}\ndata: {train: a.jsonl, completion: '{x}'}\ntrain: {steps: 1}\n")
    assert load_config(without, ["update.0.rank=4"]).update[0].rank == 4


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=3", ["train.stepz", "unknown key", "'steps'"]),
        ("trian.steps=3", ["trian", "'train'"]),
        ("train.steps=abc", ["train.steps", "integer", "'abc'"]),
        ("train.batch_size=0", ["train.batch_size", "greater than 0"]),
        ("update.0.method=lowrank", ["update.0", "'low_rank'"]),
        ("update.0.rnk=3", ["update.0.rnk", "'rank'"]),
        ("update.5.rank=3", ["update.5", "1 entries"]),
        ("optimizer.schedule=cosin", ["optimizer.schedule", "'cosine'"]),
        ("search.space.x={log_uniform: [2, 1]}", ["search.space.x", "low < high"]),
        ("search.space.x={logg: [2, 1]}", ["search.space.x.logg", "log_uniform"]),
        ("search.space.x={choice: 3}", ["search.space.x.choice", "list"]),
        ("search.space.x={power_of_two: [3, 8]}", ["search.space.x", "powers of two"]),
        ("search.promote=99", ["search", "promote 99 is above trials 16"]),
        ("train.accumulate=3", ["train", "microbatches"]),
        ("train.epochs=2", ["steps is 10 and epochs 2", "train.steps=null"]),
        ("train.steps=null", ["either steps or epochs"]),
        ("model=3", ["model", "expected keys such as path", "found a number"]),
        ("model.path.x=3", ["model.path", "no keys below"]),
        ("search.space.x={uniform: [1", ["search.space.x", "expected keys such as log_uniform", "found text"]),
        ("nonsense", ["dotted.key=value"]),
        ("train..steps=3", ["dotted.key=value"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate", "finite"]),
        ("optimizer.learning_rate=1e400", ["optimizer.learning_rate", "finite"]),
        ("search.space.x={uniform: [0, .nan]}", ["search.space.x", "finite"]),
        ("train.steps=true", ["train.steps", "should be a number"]),
        ("update.0.alpha=false", ["update.0.alpha", "should be a number"]),
        ("train.steps=99999999999", ["train.steps", "less than"]),
        ("train.seed=-1", ["train.seed", "greater than or equal to 0"]),
        ("search.seed=4294967296", ["search.seed", "less than"]),
        ("name=..", ["name"]),
        ("data.train.hash_by=text", ["data.train", "hash_split"]),
        ("data.train.data_dir=/data", ["data.train", "tfds:"]),
        ("data.train.hash_split=[0.5]", ["data.train.hash_split.1", "required"]),
        ("data.explode={field: a, schema_by: b}", ["data.explode", "schema_path"]),
        ("train.patience=3", ["override train.patience=3: train.patience", "train.evaluate_every"]),
        ("train.evaluate_every=3", ["override train.evaluate_every=3: train.evaluate_every", "data.validation"]),
        ("train={steps: 4, patience: 3, evaluate_every: null}", ["train.patience"]),
    ],
)
def test_a_wrong_override_is_named_with_the_nearest_choice(file, override, parts):
    with pytest.raises(UserError) as error:
        load_config(file, [override])
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_wrong_line_is_named(file):
    file.write_text(YAML.replace("steps: 10", "steps: ten").replace("rank: 8", "rnak: 8"))
    with pytest.raises(UserError) as error:
        load_config(file)
    message = str(error.value)
    assert f"{file}:6: train.steps" in message
    assert f"{file}:12: update.0.rnak: unknown key; did you mean 'rank'?" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "expected keys"),
        (YAML + "train: {steps: 2}\n", "twice"),
        ("\ttabs: 1\n", "run.yaml:1: not valid YAML"),
        ("model: &all [*all]\n", r"run.yaml:1: .*\*all stands inside"),
        ("model: &all {path: *all}\n", r"run.yaml:1: .*\*all stands inside"),
        ("[" * 4000, "nested too deeply"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: !!timestamp 2024-13-45", "not valid YAML"),
        ("# nothing\n", "expected keys .* found nothing"),
    ],
)
def test_a_malformed_file_is_told(file, text, part):
    file.write_text(text)
    with pytest.raises(UserError, match=part):
        load_config(file)


def test_a_file_that_is_no_text(file, tmp_path):
    file.write_bytes(YAML.encode("utf-16"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(file)
    file.write_bytes(b"\xef\xbb\xbf" + YAML.encode())
    assert load_config(file).train.steps == 10
    file.rename(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"a directory, not a YAML file; did you mean .*config\.yaml"):
        load_config(tmp_path)


def test_numbers_are_those_of_yaml_1_2(file):
    assert parse_value("010") == "010"
    assert parse_value("1:30") == "1:30"
    assert parse_value("2024-13-45") == "2024-13-45"
    assert (parse_value("0x1F"), parse_value("-1_000"), parse_value("0")) == (31, -1000, 0)
    assert load_config(file, ["train.steps=010"]).train.steps == 10


def test_a_missing_file_names_its_neighbours(file):
    with pytest.raises(UserError, match=r"did you mean .*run\.yaml"):
        load_config(file.with_name("runn.yaml"))


def test_hyperparameters_follow_from_the_annotations(file):
    config = load_config(file, ["update.0.weight_decay=0.1"])
    values = hyperparameters(config)
    assert values["optimizer.learning_rate"] == 1e-3
    assert values["update.0.rank"] == 8
    assert values["update.0.weight_decay"] == 0.1
    assert values["train.steps"] == 10
    assert "train.batch_size" not in values
    assert capacities(config) == {"update.0.rank": 8}
    # The same keys come from a section by itself.
    assert hyperparameters(config.optimizer, "optimizer.").items() <= values.items()


def test_traced_keys_share_a_program_and_shapes_do_not(file):
    config = load_config(file)
    same = {"optimizer.learning_rate": 1.0, "update.0.alpha": 2.0, "train.steps": 99, "train.seed": 5, "name": "other"}
    assert program_key(with_overrides(config, same)) == program_key(config)
    for key, value in {"train.batch_size": 4, "update.0.match": "**", "optimizer.schedule": "linear"}.items():
        assert program_key(with_overrides(config, {key: value})) != program_key(config)
    # An optional traced number that is set makes another program than one that is not.
    assert program_key(with_overrides(config, {"update.0.weight_decay": 0.1})) != program_key(config)


def test_with_overrides_checks(file):
    with pytest.raises(UserError, match=r"search\.space: .*did you mean 'learning_rate'"):
        with_overrides(load_config(file), {"optimizer.learning_rat": 1.0}, origin="search.space: ")


def test_nearest_lists_choices_when_nothing_is_close():
    assert nearest("zzz", ["alpha", "beta"]) == "; choose from alpha, beta"
    assert nearest("alpa", ["alpha", "beta"]) == "; did you mean 'alpha'?"
    assert nearest("x", []) == ""


@pytest.mark.parametrize("trace", ["run.lock", "trials.jsonl"])
def test_the_config_yaml_of_a_run_directory_means_that_directory(tmp_path, monkeypatch, trace):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("config.yaml", "other.yaml"):
        (tmp_path / "here" / name).write_text(f"run_dir: elsewhere\n{YAML}")
    # A project's own folder of checkpoints makes no run directory of it.
    (tmp_path / "here" / "checkpoints").mkdir()
    assert load_config("here/config.yaml").directory == "elsewhere"
    (tmp_path / "here" / trace).touch()
    assert load_config("here/config.yaml").directory == "here"
    assert load_config(tmp_path / "here" / "config.yaml").directory == str(tmp_path / "here")
    assert load_config("here/other.yaml").directory == "elsewhere"
    assert load_config("here/config.yaml", ["run_dir=runs/one"]).directory == "runs/one"
    monkeypatch.chdir("here")
    assert load_config("config.yaml").directory == "."
    # A folder that is named like a home is no home.
    (tmp_path / "here").rename(tmp_path / "~")
    monkeypatch.chdir(tmp_path)
    assert Path(load_config("./~/config.yaml").directory).resolve() == tmp_path / "~"


def test_homes_in_paths_are_expanded_when_they_are_read(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(
        file, ["run_dir=~/r", "search.start_from=~/s", "study.output=~/o", "study.ablation.search=~/a"]
    )
    assert (config.directory, config.search.start_from) == ("/home/me/r", "/home/me/s")
    assert (config.study.output, config.study.ablation.search) == ("/home/me/o", "/home/me/a")
    with pytest.raises(UserError, match=r"override run_dir=~nobody-here/r: run_dir: .*no user 'nobody-here'"):
        load_config(file, ["run_dir=~nobody-here/r"])
    with pytest.raises(UserError, match=r"study\.output"):
        load_config(file, ["study.output=''"])


def test_an_override_of_a_section_leaves_its_other_keys(file):
    text = YAML.replace("  steps: 10\n", "  steps: 10\n  batch_size: 8\n  keep: {best: 3}\n")
    file.write_text(
        text.replace("  space:\n", "  trials: 7\n  space:\n").replace("    rank: 8\n", "    rank: 8\n    alpha: 7\n")
    )
    config = load_config(file, ["train={steps: 3, keep: {latest: 5}}", "search={promote: 2}", "data.train={limit: 5}"])
    assert (config.train.steps, config.train.batch_size) == (3, 8)
    assert (config.train.keep.latest, config.train.keep.best) == (5, 3)
    assert (config.search.trials, config.search.promote, len(config.search.space)) == (7, 2, 2)
    assert (config.data.train.path, config.data.train.limit) == ("rows.jsonl", 5)
    assert load_config(file, ["update.0={rank: 9}"]).update[0] == config.update[0].model_copy(update={"rank": 9})
    # The same from Python, and in the settings of a study.
    assert with_overrides(config, {"train": {"steps": 4}}).train == config.train.model_copy(update={"steps": 4})


def test_an_override_of_a_value_takes_its_place(file):
    config = load_config(
        file,
        [
            "search.space={optimizer.warmup: {uniform: [0, 1]}}",
            "search.reference={optimizer.warmup: 0.5}",
            "update.0={match: lm_head, method: full}",
            "data.train=other.jsonl",
        ],
    )
    assert list(config.search.space) == ["optimizer.warmup"]
    assert config.search.reference == {"optimizer.warmup": 0.5}
    assert config.update[0].model_dump(exclude_unset=True) == {"match": "lm_head", "method": "full"}
    assert config.data.train.path == "other.jsonl"
    # One searched key is one value, of one kind.
    other = load_config(file, ["search.space.update.0.rank={choice: [1, 2]}"]).search.space
    assert other["update.0.rank"].choice == [1, 2]
    assert "optimizer.learning_rate" in other
    # A rule by its method is a whole one; null makes room for a whole section.
    assert load_config(file, ["update.0={match: '**', method: low_rank}"]).update[0].rank == 16
    assert load_config(file, ["search=null", "search={trials: 5}"]).search.space == {}


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("optimizer.lr=1", "optimizer.learning_rate"),
        ("learning_rate=1", "optimizer.learning_rate"),
        ("train.lr=1", "optimizer.learning_rate"),
        ("optimizer.eps=1", "optimizer.epsilon"),
        ("epochs=1", "train.epochs"),
        ("num_train_epochs=1", "train.epochs"),
        ("per_device_train_batch_size=1", "train.batch_size"),
        ("data.batch_size=1", "train.batch_size' or 'evaluation.batch_size"),
        ("gradient-accumulation-steps=1", "train.accumulate"),
        ("update.0.lora_alpha=1", "update.0.alpha"),
        ("update.0.r=1", "update.0.rank"),
        ("target_modules=[q_proj]", "update.0.match"),
        ("peft.r=1", "update"),
        ("output_dir=x", "run_dir"),
        ("seed=1", "train.seed' or 'search.seed"),
        ("train.max_grad_norm=1", "optimizer.clip_norm"),
    ],
)
def test_the_names_of_other_tools_and_sections_are_known(file, override, ours):
    with pytest.raises(UserError, match=rf": unknown key; did you mean '{ours}'\?$"):
        load_config(file, [override])


def test_every_name_of_another_tool_stands_for_a_key_that_there_is(file):
    """And for one alone, and for none that is ours already."""
    names = [name for theirs in _ALIASES.values() for name in theirs]
    assert len(set(names)) == len(names)
    ours = set(_by_last_part())
    assert not ours & set(names)
    assert {key.rpartition(".")[2] for key in _ALIASES} <= ours
    known = {key for keys in _by_last_part().values() for key in keys}
    assert known >= _ALIASES.keys()


@pytest.mark.parametrize(
    "words",
    [
        ["train.steps", "=", "3"],
        ["train.steps=", "3"],
        ["train.steps", "=3"],
        ["train.steps", "3", "name=x"],
        ["train.steps = 3"],
        ["train.steps =3"],
        ["train.steps: 3"],
        ["train.steps:", "3"],
    ],
)
def test_spaces_around_the_equals_sign_are_told(file, words):
    with pytest.raises(UserError, match=r"without spaces; did you mean train\.steps=3\?$"):
        load_config(file, words)


def test_what_is_no_key_and_value_is_left_alone(file):
    for words in (["nonsense"], ["a.b", "train.steps=3"], ["train..steps=3"], ["=3"]):
        with pytest.raises(UserError, match=r"expected dotted\.key=value$"):
            load_config(file, words)
    with pytest.raises(UserError, match=r"did you mean data\.prompt='\{text\} : x'\?"):
        load_config(file, ["data.prompt = {text} : x"])
    assert load_config(file, ["run_dir=", "train.steps=3"]).run_dir is None
    assert load_config(file, ["name= x"]).name == "x"
