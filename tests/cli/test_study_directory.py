"""What export, evaluate and generate take: a study's directory, one of its trials, a run's directory."""

import json
import shlex
import shutil

import numpy as np
import pytest

from jaxtune.cli import main
from jaxtune.config import dotted, load_config
from jaxtune.search.journal import read_journal
from tests.tiny_task import configuration

SEARCH = (
    "search={trials: 4, promote: 2, initial: 2, space: {optimizer.learning_rate: {log_uniform: [1e-3, 1e-1]}, "
    "update.0.rank: {power_of_two: [2, 8]}}}"
)
EPOCHS = ("train={steps: null, epochs: 2.5, log_every: 5}", "optimizer.learning_rate=2e-3")


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_model, rows):
    """The directory of a study that has ended, whose trials differ in rank and whose length is given in epochs."""
    folder = tmp_path_factory.mktemp("study")
    file = folder / "study.yaml"
    file.write_text(configuration(folder / "run", tiny_model, rows))
    assert main(["search", str(file), SEARCH, *EPOCHS]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def summary(study):
    return json.loads((study / "summary.json").read_text())


def told(capsys, *arguments, code=0):
    """The JSON that a command prints, or the message that it is refused with."""
    capsys.readouterr()
    assert main([*map(str, arguments), *(["--json"] if code == 0 else [])]) == code
    output = capsys.readouterr()
    return json.loads(output.out) if code == 0 else output.err


def test_a_study_s_directory_means_its_winner(study, summary, capsys, tiny_model, tmp_path):
    """Evaluated, exported, and as the adapter that lies in it; transformers and peft answer alike."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    best = summary["best"]
    found = told(capsys, "evaluate", study)
    assert found["metrics"]["loss"] == pytest.approx(best["test_score"], rel=1e-6)
    assert f"trial {best['trial']}," in found["subject"]
    assert summary["adapter"]["path"] == str(study / "adapter")
    assert summary["adapter"]["trial"] == best["trial"]
    told(capsys, "export", study, "--merged", tmp_path / "merged")
    asked = ("--prompt", "w1 w2 w3 :", "--max-new-tokens", 4)
    (answer,) = told(capsys, "generate", study / "config.yaml", *asked)["continuations"]
    (same,) = told(capsys, "generate", study, "--untuned", f"model.path={tmp_path / 'merged'}", *asked)["continuations"]
    assert answer == same
    tokens = torch.tensor([[5, 9, 12, 3]])
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        plain = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, study / "adapter")(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens).logits
    np.testing.assert_allclose(adapted.numpy(), merged.numpy(), rtol=1e-4, atol=1e-4)
    assert np.abs(adapted.numpy() - plain.numpy()).max() > 0.1


def test_trial_0_is_the_configuration_itself_and_no_program_of_its_own(study, summary):
    """The paper has another rate, rank, scale, dropout and batch."""
    assert summary["budget"]["compilations"] == 1
    assert summary["baseline"]["configuration"] == {"optimizer.learning_rate": 2e-3, "update.0.rank": 4}
    assert summary["baseline"]["in_space"], "the surrogate learns from it"
    own, trial = (dotted(load_config(place / "config.yaml")) for place in (study, study / "trials" / "000"))
    different = {key for key in own if own[key] != trial[key]}
    assert different == {"train.epochs", "train.steps", "run_dir"}, "epochs are counted, and that is all"
    assert trial["train.steps"] == 20


def test_every_finished_trial_can_be_used(study, summary, capsys, tmp_path):
    """Each with its own rank and score, though all were trained with room for the largest; also by its directory."""
    finished = [trial for trial in summary["trials"] if trial["status"] == "finished"]
    assert len(finished) == 3
    for trial in finished:
        name, best = f"{trial['id']:03d}", trial["id"] == summary["best"]["trial"]
        place = (study / "trials" / name,) if best else (study, "--trial", trial["id"])
        found = told(capsys, "evaluate", *place, "--split", "validation")
        assert found["metrics"]["loss"] == pytest.approx(trial["final_score"], rel=1e-6)
        told(capsys, "export", *place, "--peft", tmp_path / name)
        rank = json.loads((tmp_path / name / "adapter_config.json").read_text())["r"]
        assert rank == trial["configuration"]["update.0.rank"]


def test_compare_sets_winner_trial_and_model_beside_each_other(study, summary, capsys, tmp_path, monkeypatch):
    """Scores are those of the study, settings and answers each trial's own; and what was evaluated once is kept."""
    best = summary["best"]["trial"]
    other = next(one for one in summary["trials"] if one["status"] == "finished" and one["id"] != best)
    task = ("evaluation.task=extraction", "evaluation.max_new_tokens=3", "evaluation.stop=null")
    names = [str(study), f"{study}@{other['id']}", f"{study}@untuned"]
    words = ("compare", *names, *task, "--split", "validation")
    found = told(capsys, *words, "--html", tmp_path / "page.html")
    assert [run["run"] for run in found["runs"]] == names
    losses = [run["metrics"]["loss"] for run in found["runs"]]
    assert losses[:2] == pytest.approx([summary["best"]["final_score"], other["final_score"]], rel=1e-6)
    assert "exact_match" in found["runs"][2]["metrics"]
    for entry, loss in zip(found["differences"], losses[1:], strict=True):
        assert entry["metrics"]["loss"]["difference"] == pytest.approx(loss - losses[0], abs=1e-6)
    values = [summary["best"]["configuration"], other["configuration"]]
    different = {key for key in values[0] if values[0][key] != values[1][key]}
    assert {key: found["keys"][key][:2] for key in different} == {
        key: [each[key] for each in values] for key in different
    }
    assert found["keys"].keys() <= {*values[0], *values[1]}
    assert len(found["side_by_side"]) == found["examples"] == 12
    assert any(row["differs"] for row in found["side_by_side"])
    assert "page.html" in found["html"]
    assert (tmp_path / "page.html").read_text().count("<article") == 12

    def evaluated(*_):
        raise AssertionError("evaluated a second time")

    monkeypatch.setattr("jaxtune.training.predictions._evaluate", evaluated)
    assert told(capsys, *words) == {name: value for name, value in found.items() if name != "html"}


def test_what_does_not_compare_is_refused_before_a_model_is_opened(study, summary, capsys, tmp_path, rows, tiny_model):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(configuration(other, tiny_model, rows))
    config = other / "config.yaml"
    assert "1 RUN is nothing to compare" in told(capsys, "compare", study, code=2)
    assert "named twice" in told(capsys, "compare", study, study, code=2)
    assert "behind @ stands" in told(capsys, "compare", study, f"{study}@last", code=2)
    nearest = max(trial["id"] for trial in summary["trials"] if trial["status"] == "finished")
    assert f"name {study}@{nearest} " in told(capsys, "compare", study, f"{study}@40", code=2)
    assert told(capsys, "compare", study, other, "--dry-run")["checked"]
    config.write_text(config.read_text() + "evaluation: {task: extraction}\n")
    assert "runs of different tasks" in told(capsys, "compare", study, other, code=2)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((rows / "test.jsonl").open().readlines()[1:]))
    config.write_text(configuration(other, tiny_model, rows).replace(str(rows / "test.jsonl"), str(fewer)))
    assert "12 examples and" in told(capsys, "compare", study, other, code=2)
    assert told(capsys, "compare", study, other, "--split", "validation", "--dry-run")["checked"]


def test_a_study_ends_with_the_commands_that_come_next(study, capsys, tmp_path, monkeypatch):
    """They run as they are printed."""
    capsys.readouterr()
    assert main(["search", str(study / "config.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"adapter, as PEFT loads it: {study / 'adapter'}" in lines
    commands = [shlex.split(line) for line in lines[lines.index("what comes next:") + 1 :]]
    assert [words[:2] for words in commands] == [["jaxtune", name] for name in ("evaluate", "generate", "export")]
    for words in commands:
        assert main([*words[1:], "--dry-run"]) == 0


def test_what_is_no_finished_trial_is_refused_with_the_nearest(study, summary, capsys, tmp_path):
    status = {trial["id"]: trial["status"] for trial in summary["trials"]}
    (scored,) = (number for number, word in status.items() if word == "scored")
    others = [number for number in status if number != scored]
    message = told(capsys, "export", study, "--merged", tmp_path / "x", "--trial", scored, code=2)
    assert f"--trial {scored}: not finished, but scored (step 8 of 20)" in message
    assert f"name --trial {min(others, key=lambda other: abs(other - scored))} (" in message
    message = told(capsys, "evaluate", study, "--trial", 40, code=2)
    assert "no such trial" in message
    assert "has trials 0 to 3" in message
    assert f"name --trial {max(others)} " in message
    assert "did you mean" in told(capsys, "evaluate", f"{study}n", code=2)
    assert "no run or study here" in told(capsys, "evaluate", study.parent, code=2)
    assert not (tmp_path / "x").exists()


def test_a_study_without_a_winner_yet_names_a_finished_trial(study, capsys, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text((study / "config.yaml").read_text())
    records = read_journal(study)

    def cut(records):
        (begun / "trials.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    end = next(number for number, record in enumerate(records) if record["event"] == "finished") + 1
    cut(records[:end])
    message = told(capsys, "evaluate", begun, code=2)
    assert "no winner yet" in message
    assert f"jaxtune search {begun / 'config.yaml'}" in message
    assert f"name --trial {records[end - 1]['trial']}, the only one" in message
    cut(records[:3])
    assert "no trial is finished yet" in told(capsys, "export", begun, "--merged", tmp_path / "x", code=2)


def test_a_winner_whose_checkpoint_is_damaged_is_told_with_what_to_do(study, summary, capsys, tmp_path):
    copy, best = shutil.copytree(study, tmp_path / "copy"), summary["best"]["trial"]
    other = next(one["id"] for one in summary["trials"] if one["status"] == "finished" and one["id"] != best)
    for number in (best, other):
        newest = max((copy / "trials" / f"{number:03d}" / "checkpoints").iterdir(), key=lambda step: int(step.name))
        shutil.rmtree(newest / "loop")
    again = f"train it again: jaxtune train {copy / 'config.yaml'} "
    message = told(capsys, "export", copy, "--peft", tmp_path / "exported", code=2)
    assert "a damaged checkpoint" in message
    assert f"name --adapter {copy / 'adapter'}, or {again}" in message
    message = told(capsys, "export", copy, "--trial", other, "--peft", tmp_path / "exported", code=2)
    assert f"restore it from a copy, or {again}" in message
