"""What a user gets for wrong input: exit code 2, one message that names the place and the nearest choice."""

import dataclasses
import json
import os

import pytest

from jaxtune.cli import main

SEARCH = "search={space: {optimizer.learning_rate: {log_uniform: [1e-4, 1e-2]}}, trials: 3, promote: 1}"


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must be refused, and returns its message; nothing may have been written."""

    def run(*arguments, writes=False):
        before = sorted(tmp_path.rglob("*"))
        code = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert code == 2, output.err
        assert output.out == ""
        assert "Traceback" not in output.err
        assert output.err.startswith("jaxtune: ")
        if not writes:
            assert sorted(tmp_path.rglob("*")) == before
        return output.err

    return run


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=3", ["train.stepz", "'steps'"]),
        ("train.steps=many", ["train.steps", "integer"]),
        ("data.train=missing.jsonl", ["data.train", "missing.jsonl"]),
        ("data.prompt={quesion} :", ["quesion", "question"]),
        ('data.completion=""', ["empty"]),
        ("train.sequence_length=4", ["sequence_length"]),
        ("train.sequence_length=1000", ["train.sequence_length", "64"]),
        ("parallel.data=3", ["parallel", "data 3"]),
        ("train.batch_size=9", ["train.batch_size", "divide"]),
        ("train.patience=3", ["train.patience", "train.evaluate_every"]),
        ("model.path=nowhere/at-all", ["nowhere"]),
        ("model.path=jaxtune:nanno", ["jaxtune:nano"]),
        ("update.0.match=layers.*.atention.q", ["update.0", "attention"]),
        ("update.0.match=layers.*.attention.{q,x}", ["update.0"]),
        ("data.train.split=train[5", ["split"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate", "finite"]),
        ("name=..", ["name"]),
    ],
)
@pytest.mark.parametrize("name", ["train"])
def test_a_wrong_value_is_named(refused, config_file, name, override, parts):
    message = refused(name, config_file, override)
    assert all(part in message for part in parts), message


def test_rows_are_named_by_file_and_line(refused, config_file, tmp_path):
    bad = tmp_path / "bad.jsonl"
    good = json.dumps({"question": "w1 w2", "answer": "w3"})
    bad.write_text(f"{good}\n{{broken\n")
    message = refused("train", config_file, f"data.train={bad}")
    assert "bad.jsonl" in message
    assert "2" in message
    bad.write_text(f'{good}\n{{"question": "w1"}}\n')
    message = refused("train", config_file, f"data.train={bad}")
    assert "answer" in message
    assert "2" in message
    bad.write_text("")
    assert "empty" in refused("train", config_file, f"data.train={bad}")
    bad.write_text(f'{good}\n{{"question": "w1", "answer": ""}}\n')
    assert "2" in refused("train", config_file, f"data.train={bad}", "data.completion={answer}")


def test_a_truncated_checkpoint_is_refused(refused, config_file, tiny_model, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused("train", config_file, f"model.path={copy}")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian", "x.yaml"], ["'train'"]),
        (["study", "early-scroe", "x.yaml"], ["jaxtune study", "'early-score'"]),
        (["train"], ["CONFIG"]),
        (["train", "missing.yaml"], ["missing.yaml"]),
        (["train", "x.yaml", "--jsn"], ["--jsn"]),
        (["report", "missing-dir"], ["missing-dir"]),
        (["train", "x.yaml", "--dry"], ["--dry", "'--dry-run'"]),
        (["evaluate", "x.yaml", "--split", "tset"], ["--split", "'test'"]),
        (["evaluate", "x.yaml", "--split", "test", "--json", "--split=train"], ["--split", "given twice"]),
    ],
)
def test_the_command_line_itself(refused, arguments, parts):
    message = refused(*arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", ["train", "search"])
def test_a_place_that_cannot_be_written_is_refused_before_training(refused, config_file, tmp_path, name):
    (tmp_path / "file").write_text("")
    message = refused(name, config_file, SEARCH, "--dry-run", f"run_dir={tmp_path / 'file' / 'run'}")
    assert "run_dir" in message
    assert "no folder" in message


def test_a_result_that_cannot_be_written_is_refused_before_the_work(refused, config_file, tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    assert "--merged" in refused("export", config_file, "--untuned", "--merged", below)
    assert "--trace" in refused("profile", config_file, "--trace", below)
    evaluate = ("evaluate", config_file, "--untuned", "evaluation.task=extraction", "--predictions")
    assert "--predictions" in refused(*evaluate, below)
    assert "is a directory" in refused(*evaluate, tmp_path)


def test_a_study_and_a_run_do_not_share_a_directory(refused, config_file, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "trials.jsonl").write_text("{}\n")
    assert "holds a study" in refused("train", config_file)
    assert "trials.jsonl: the journal is empty" in refused("generate", config_file, "--prompt", "w1")
    (run / "trials.jsonl").rename(run / "metrics.jsonl")
    assert "holds a single run" in refused("search", config_file, SEARCH)


def test_a_damaged_summary_is_named(refused, config_file, tmp_path):
    from jaxtune.config import dump_config, load_config

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config(config_file)))
    (run / "summary.json").write_text('{"stopped": "fin')
    assert "summary.json" in refused("train", config_file)


def test_a_tokenizer_of_another_model_is_refused(refused, config_file, tiny_model, tmp_path):
    import jax

    from jaxtune.models import random_model, read_config, save_model

    small = dataclasses.replace(read_config(tiny_model), vocab_size=20)
    save_model(random_model(small, jax.random.key(0)), tmp_path / "small", tokenizer_from=tiny_model)
    message = refused("train", config_file, f"model.path={tmp_path / 'small'}")
    assert "model.tokenizer" in message
    assert "20" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "nan"), ("--top-k", "-1"), ("--top-p", "0"), ("--seed", "-1"), ("--prompt", "")],
)
def test_sampling_settings_are_checked_on_a_dry_run(refused, config_file, option, value):
    message = refused("generate", config_file, "--untuned", "--dry-run", "--prompt", "w1", option, value)
    assert option.strip("-").replace("-", "_") in message


def test_a_directory_with_another_run_is_left_alone(refused, config_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in refused("train", config_file)


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        ("{}", ["search.space"]),
        ("{optimizer.learning_rat: {uniform: [1, 2]}}", ["learning_rat", "learning_rate"]),
        ("{optimizer.learning_rate: {uniform: [-1, 2]}}", ["optimizer.learning_rate", "greater than 0"]),
        ("{optimizer.learning_rate: {log_uniform: [1e-2, 1e-4]}}", ["optimizer.learning_rate", "low < high"]),
        ("{update.0.rank: {power_of_two: [8, 4]}}", ["update.0.rank", "low < high"]),
        ("{optimizer.schedule: {choice: cosine}}", ["optimizer.schedule", "list", "'cosine'"]),
        ("{update.0.rank: {uniform: [1, 2.5]}}", ["update.0.rank"]),
        ("{update.0.rank: {uniform: [1, 8]}}", ["update.0.rank", "integer"]),
        ("{model.path: {choice: [a, b]}}", ["model.path", "same for all trials"]),
        ("{parallel.data: {choice: [1, 2]}}", ["parallel.data", "same for all trials"]),
        ("{train.sequence_length: {choice: [8, 4]}}", ["train.sequence_length", "longest example"]),
        ("{train.sequence_length: {choice: [8, 1000]}}", ["train.sequence_length", "context of 64"]),
        (
            "{update.0.match: {choice: ['layers.*.attention.q', 'layers.*.atention.q']}}",
            ["update.0.match", "attention"],
        ),
        ("{train.batch_size: {choice: [8, 9]}}", ["train.batch_size", "divide"]),
        ("{train.steps: {integer: [2, 20]}}", ["search.fraction", "less than a step"]),
        ("{update.0.rank: {integer: [1, 2]}, search.trials: {integer: [1, 2]}}", ["search.trials", "same for all"]),
    ],
)
def test_a_wrong_space_is_refused(refused, config_file, space, parts):
    message = refused("search", config_file, f"search={{space: {space}, trials: 3, promote: 1}}")
    assert all(part in message for part in parts), message


def test_a_search_needs_its_section_and_a_validation_split(refused, config_file):
    assert "search:" in refused("search", config_file)
    assert "data.validation" in refused("search", config_file, SEARCH, "data.validation=null")
    assert "evaluation.task" in refused("search", config_file, SEARCH, "search.objective=exact_match")
    assert "less than a step" in refused("search", config_file, SEARCH, "train.steps=2")
    assert "promote 4 is above trials 3" in refused("search", config_file, SEARCH, "search.promote=4")
    assert "search: finish [0.1, 1.0] must ascend" in refused("search", config_file, SEARCH, "search.finish=[0.1, 1.0]")
    assert "search.fixed" in refused("search", config_file, SEARCH, "search.fixed.update.0.rank=4")


def test_commands_that_need_a_trained_run_say_so(refused, config_file, tmp_path):
    for name, extra in (("evaluate", []), ("export", ["--merged", tmp_path / "out"]), ("generate", ["--prompt", "w1"])):
        assert "jaxtune train" in refused(name, config_file, *extra)


@pytest.mark.parametrize("part", ["²", "٣", "9" * 5000, "-1", "1.0"])
def test_only_a_number_in_the_list_names_an_entry(refused, config_file, part):
    message = refused("train", config_file, f"update.{part}.rank=3")
    assert f"update.{part.split('.')[0]}" in message


def test_a_name_that_is_too_long_is_refused_before_the_model_is_opened(refused, config_file, tmp_path, monkeypatch):
    from jaxtune.training import opened_config

    monkeypatch.setattr(opened_config, "load_tokenizer", lambda *_: pytest.fail("the model was opened"))
    long, beyond = "n" * 300, "n" * 241
    for name in (f"name={long}", f"run_dir={tmp_path / long / 'run'}", f"run_dir={beyond}"):
        key = name.partition("=")[0]
        assert key in refused("train", config_file, name)
        assert key in refused("train", config_file, name, "train.steps=null", "train.epochs=1")
        assert key in refused("search", config_file, SEARCH, name)
        assert key in refused("evaluate", config_file, name)
    assert "--merged" in refused("export", config_file, "--untuned", "--merged", tmp_path / long)
    assert "--trace" in refused("profile", config_file, "--trace", tmp_path / long)
    assert "--predictions" in refused("evaluate", config_file, "--predictions", tmp_path / long)
    assert "File name too long" in refused("train", f"{long}.yaml")
    monkeypatch.undo()
    assert "File name too long" in refused("train", config_file, f"data.train={long}.jsonl")


@pytest.mark.parametrize("arguments", [["train", "{}"], ["export", "x.yaml", "--merged", "{}"], ["report", "{}"]])
def test_a_path_that_is_no_utf8_is_refused(refused, tmp_path, arguments):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    assert "is no UTF-8 text" in refused(*(word.format(name) for word in arguments))


def test_a_prompt_beyond_the_context_is_refused(refused, config_file):
    prompt = ("generate", config_file, "--untuned", "--dry-run", "--prompt")
    message = refused(*prompt, " ".join(["w1"] * 65))
    assert "prompt 0 takes 65 tokens, more than the model's context of 64 positions" in message
    assert main([str(word) for word in (*prompt, " ".join(["w1"] * 64))]) == 0


def test_an_escape_that_is_none_is_named(refused, config_file):
    message = refused("generate", config_file, "--untuned", "--escapes", "--prompt", r"C:\quiet")
    assert r"\q in the prompt" in message
    assert r"\n, \t, \r, \\" in message
