"""The commands as programs call them: JSON on standard output, files in the run directory, nothing on a dry run."""

import io
import json
import resource
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from jaxtune.cli import COMMANDS, main
from jaxtune.cli.search import _dry_text
from jaxtune.cli.study import COMMANDS as STUDY_COMMANDS
from jaxtune.telemetry.writers import read_metrics

SEARCH = (
    "search={trials: 4, promote: 2, initial: 2, space: {optimizer.learning_rate: {log_uniform: [1e-3, 1e-1]}, "
    "update.0.rank: {power_of_two: [2, 8]}, update.0.dropout: {uniform: [0.0, 0.2]}}}"
)


@pytest.fixture
def result(capsys):
    """Runs a command with --json and returns the one object it prints."""

    def run(*arguments):
        code = main([*(str(argument) for argument in arguments), "--json"])
        output = capsys.readouterr()
        assert code == 0, output.err
        return json.loads(output.out)

    return run


SINGLE = [[name] for name in COMMANDS if name != "study"] + [["study", name] for name in STUDY_COMMANDS]


@pytest.mark.parametrize("words", SINGLE, ids=" ".join)
def test_every_command_has_help_with_an_example_and_json(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    usage, example = capsys.readouterr().out.split("example:")
    assert " ".join(["jaxtune", *words]) in example
    assert "--json" in usage or words == ["profile"]


def test_help_lists_the_commands_of_a_command(capsys):
    for words in (["study"], ["study", "--help"]):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert all(f"  {name} " in printed for name in STUDY_COMMANDS)


def test_help_answers_at_once():
    """Counted in processor time, which is what the wall clock shows on a machine that does nothing else."""
    seconds = min(_processor_seconds() for _ in range(3))
    assert seconds < 0.7, f"jaxtune --help took {seconds:.2f} s"


def _processor_seconds() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "jaxtune", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_base_install_imports_no_torch_and_no_tensorflow():
    # A package that the path finder does not find is one that is not installed.
    code = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = ("torch", "tensorflow", "pyarrow", "datasets", "peft")
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in absent else find(name, *rest)
import jaxtune, jaxtune.cli.train, jaxtune.cli.search
assert all(getattr(jaxtune, name) is not None for name in jaxtune.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_then_use_what_it_left(result, capsys, config_file, tmp_path):
    assert result("train", config_file, "--dry-run")["trained_parameters"] == 896
    assert not (tmp_path / "run").exists()
    summary = result("train", config_file, "optimizer.learning_rate=1e-2", "train.evaluate_every=5")
    run = tmp_path / "run"
    assert summary["stopped"] == "finished"
    assert summary["compilations"] == 1
    assert json.loads((run / "summary.json").read_text()) == summary
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 21))
    # The resolved configuration repeats the run: here it finds it finished.
    resolved = run / "config.yaml"
    assert result("train", resolved) == summary
    assert main(["train", str(resolved)]) == 0
    output = capsys.readouterr()
    printed = output.out
    assert f"the run in {run} had ended: nothing was trained" in output.err
    assert f"adapter, as PEFT loads it: {run / 'adapter'}" in printed
    assert f"  jaxtune export {run} --merged {run}-merged" in printed
    # A run's directory means the run, which has no trials.
    evaluated = result("evaluate", run, "--split", "validation")
    assert main(["evaluate", str(run), "--trial", "0"]) == 2
    assert "a single run, not a study" in capsys.readouterr().err
    assert evaluated["metrics"]["loss"] == pytest.approx(summary["metrics"]["validation_loss"], rel=1e-5)
    through_peft = result("evaluate", resolved, "--split", "validation", "--adapter", run / "adapter")
    assert through_peft["metrics"]["loss"] == pytest.approx(evaluated["metrics"]["loss"], rel=1e-5)
    untuned = result("evaluate", resolved, "--split", "validation", "--untuned")
    assert untuned["metrics"]["loss"] > evaluated["metrics"]["loss"]
    result("export", resolved, "--merged", tmp_path / "merged")
    merged = result(
        "evaluate",
        resolved,
        "--split",
        "validation",
        "--untuned",
        f"model.path={tmp_path / 'merged'}",
        f"run_dir={run}",
    )
    assert merged["metrics"]["loss"] == pytest.approx(evaluated["metrics"]["loss"], rel=1e-4)
    generated = result("generate", resolved, "--prompt", "w1 w2 w3 :", "--max-new-tokens", 3)
    assert len(generated["continuations"]) == 1
    # Another configuration in the same directory is refused and changes nothing.
    assert main(["train", str(config_file), "optimizer.learning_rate=1e-3"]) == 2
    assert json.loads((run / "summary.json").read_text()) == summary


def test_generate_answers_conversations(capsys, config_file, tiny_model, tmp_path):
    model = tmp_path / "chat"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(
        "{% if tools %}{{ 'w9 ' }}{% endif %}{% for m in messages %}{{ m.role + ' : ' + m.content + ' </s> ' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'w8 :' }}{% endif %}"
    )
    talk = [{"role": "w1", "content": "w2 w3"}, {"role": "assistant", "content": "w4"}, {"role": "w1", "content": "w5"}]
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{json.dumps(talk)}\n{json.dumps({'messages': talk, 'tools': [{'name': 'f'}]})}\n")
    command = ["generate", str(config_file), "--untuned", "--max-new-tokens", "3", f"model.path={model}"]
    code = main([*command, "--messages", str(path), "--json"])
    output = capsys.readouterr()
    assert code == 0, output.err
    found = json.loads(output.out)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [
        tokenizer.apply_chat_template(talk, tools=tools, add_generation_prompt=True, tokenize=False)
        for tools in (None, [{"name": "f"}])
    ]
    assert found["prompts"] == texts
    # The tokenizer adds nothing in front, so the same text as a plain prompt has the same ids.
    assert main([*command, "--prompt", texts[0], "--prompt", texts[1], "--json"]) == 0
    assert found["continuations"] == json.loads(capsys.readouterr().out)["continuations"]
    # Where examples are turns of a chat, a prompt is the user's.
    assert main([*command, "data.chat=true", "--prompt", "w2 w3", "--json"]) == 0
    asked = [{"role": "user", "content": "w2 w3"}]
    expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert json.loads(capsys.readouterr().out)["prompts"] == [expected]
    for options, message in (
        (["--messages", str(path), "--prompt", "w1"], "not both"),
        (["--messages", str(tmp_path / "no.json")], "no.json cannot be read"),
        (["--messages", str(path), f"model.path={tiny_model}"], "or give texts with --prompt"),
        (["data.chat=true", "--prompt", "w1", f"model.path={tiny_model}"], "no chat template"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err


def test_search_end_to_end(result, capsys, config_file, tmp_path):
    arguments = ("search", config_file, SEARCH, "train.batch_size=16", "train.log_every=5")
    budget = "search.budget={steps: 93, seconds: 60}"
    checked = result(*arguments, "search.finish=[0.5, 1.0]", "search.seeds=2", budget, "--dry-run")
    assert (checked["trials"], checked["early_steps"]) == (4, 4)
    assert [(rung["step"], rung["trials"]) for rung in checked["finish"]] == [(10, 2), (20, 1)]
    # Three to 4 steps, two and the reference to 10, one and the reference to 20, and these two again.
    assert checked["steps"] == 3 * 4 + 3 * 6 + 2 * 10 + 2 * 20
    assert checked["budget"] == {"steps": 93, "seconds": 60, "trials": 3}
    told = _dry_text(checked)
    assert "2 on to step 10, 1 finished by score, the best 2 with 1 more seeds each (40 steps): 90 steps" in told
    assert "search.budget of 93 steps pays for 3 of 4 trials like the reference, finishing included" in told
    assert "search.budget of 60 seconds" in told
    assert "straight" not in told
    assert "\nfinishing straight to the end: it is short\n" in _dry_text({**checked, "straight": "it is short"})
    assert not (tmp_path / "run").exists()
    summary = result(*arguments)
    # Four trials that differ in rate, rank and dropout, and the reference: one compiled step.
    assert summary["budget"]["compilations"] == 1
    assert [trial["id"] for trial in summary["trials"]] == [0, 1, 2, 3]
    assert sum(trial["final_score"] is not None for trial in summary["trials"]) == 3
    best = summary["best"]
    assert best["final_score"] == min(t["final_score"] for t in summary["trials"] if t["final_score"] is not None)
    assert best["test_score"] < summary["untuned"]["test_score"]
    # All to 4 of 20 steps, the three others and the reference to 8, two and the reference to the end.
    assert summary["budget"]["steps_run"] == 4 * 4 + 4 * 4 + 3 * 12
    assert [(rung["step"], len(rung["trials"])) for rung in summary["finish"]] == [(8, 4), (20, 3)]
    assert (tmp_path / "run" / "report.html").exists()
    # The winner's own command repeats its trial: a column's start does not depend on the study's largest rank.
    import shlex

    words = shlex.split(best["command"])
    assert words[:2] == ["jaxtune", "train"]
    again = result(*words[1:])
    assert again["metrics"]["validation_loss"] == pytest.approx(best["final_score"], rel=1e-4)
    capsys.readouterr()
    assert result(*arguments) == summary
    assert main([str(argument) for argument in arguments]) == 0
    assert f"the study in {tmp_path / 'run'} had ended: nothing was trained" in capsys.readouterr().err


def test_profile_and_doctor(result, config_file, tmp_path):
    profiled = result("profile", config_file, "--steps", 2, "--trace", tmp_path / "trace")
    assert profiled["tokens_per_second"] > 0
    assert any((tmp_path / "trace").rglob("*.xplane.pb"))
    assert not (tmp_path / "run").exists()
    assert result("doctor")["matmul"]["ok"]


def test_prompts_are_taken_as_they_stand(result, config_file, monkeypatch):
    shared = ("generate", config_file, "--untuned", "--max-new-tokens", 1)
    given = [r"C:\new \w1", r"w1\nw2", "w1 w2"]
    asked = [word for text in given for word in ("--prompt", text)]
    assert result(*shared, *asked)["prompts"] == given
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1\\nw2\nC:\\\\new\\tw3\n"))
    assert result(*shared, "--escapes")["prompts"] == ["w1\nw2", "C:\\new\tw3"]


def test_the_loss_of_a_broken_model_is_null(result, config_file, tiny_model, tmp_path):
    import jax.numpy as jnp

    from jaxtune.models import Decoder, load_model, save_model, split

    model = load_model(tiny_model)
    params = split(model)[1]
    broken = params | {"final_norm.scale": jnp.full_like(params["final_norm.scale"], jnp.nan)}
    save_model(Decoder(model.config, broken), tmp_path / "broken", tokenizer_from=tiny_model)
    evaluated = result("evaluate", config_file, "--untuned", f"model.path={tmp_path / 'broken'}")
    assert evaluated["metrics"]["loss"] is None
    assert evaluated["standard_errors"]["loss"] is None
