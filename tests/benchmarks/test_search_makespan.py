"""The makespan benchmark on a tiny study: both sides do the same work, and the figures follow from the events."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("optuna")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SEARCH = {"trials": 3, "promote": 1, "population": 2, "fraction": 0.25}
STEPS = 8


@pytest.fixture(scope="module")
def modules():
    """The benchmark's files; scripts find each other beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("makespan_task", "makespan_parts", "makespan_peer", "search_makespan")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def folder(modules, tmp_path_factory):
    """A prepared task: examples of real lengths, packed by jaxtune."""
    directory = tmp_path_factory.mktemp("makespan")
    task = modules["makespan_task"]
    setting = task.PRESETS["tiny"][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "_rows", lambda *_: 8)  # the tests' eight devices take a row each
        task.prepare(setting, SEARCH, STEPS, 8, directory)
    return directory


def test_the_untuned_loss_is_one_number(modules, folder):
    ours = json.loads((folder / "described.json").read_text())["untuned_loss"]
    assert modules["makespan_peer"].Peer(folder).untuned() == pytest.approx(ours, rel=1e-5)


def test_a_step_has_the_same_examples(modules, folder):
    """The tokens that jaxtune's packed rows hold are those of the peer's group, no more and no less."""
    from jaxtune.config import load_config
    from jaxtune.training.opened_config import OpenedConfig

    peer = modules["makespan_peer"].Peer(folder)
    batches = OpenedConfig(load_config(folder / "config.yaml")).batches()
    for group in peer.task["groups"]:
        batch = next(batches)
        targets = batch["targets"][batch["segment_ids"] > 0]
        theirs = [peer._train[place][0][1:] for place in group]
        assert np.array_equal(np.sort(targets), np.sort(np.concatenate(theirs)))
    batches.close()


def test_the_peer_goes_on_where_it_stopped(modules, folder):
    peer = modules["makespan_peer"].Peer(folder)
    values = {**peer.task["reference"], "optimizer.learning_rate": 1e-2}
    whole, _ = peer.train(values, 0, STEPS, None)
    early, saved = peer.train(values, 0, STEPS // 2, None)
    resumed, _ = peer.train(values, STEPS // 2, STEPS, saved)
    assert resumed == pytest.approx(whole, rel=1e-6)
    assert abs(early - whole) > 1e-4
    assert peer.steps_run == 2 * STEPS


@pytest.mark.slow
def test_all_ways_run_and_agree_on_the_reference(modules, folder):
    """The reference is one configuration: its scores are the same in all ways, within what two frameworks differ."""
    script = modules["search_makespan"]
    runs = {}
    for way in script.WAYS:
        script._remove(folder / "run")
        runs[way] = [{**script.alone(way, folder, time.time()), "load_before": 0.0}]
        parts = runs[way][0]["parts"]
        assert sum(parts.values()) == pytest.approx(runs[way][0]["seconds"], rel=0.05)
        assert parts["steps"] > 0 < parts["evaluation"]
        assert (parts["compiling"] > 0) == (not way.startswith("peer"))
    result = script.summarise(runs, SEARCH["population"])
    assert result["speedup_over_peer"] == pytest.approx(result["seconds"]["peer"] / result["seconds"]["population"])
    early = round(SEARCH["fraction"] * STEPS)
    steps = SEARCH["trials"] * early + (SEARCH["promote"] + 1) * (STEPS - early)
    for way in ("population", "single", "peer_at_fraction"):
        assert result["ways"][way]["steps_run"] == steps
        assert result["ways"][way]["trials_finished"] == SEARCH["promote"] + 1
    assert result["ways"]["peer"]["steps_run"] == SEARCH["trials"] * STEPS, "five trials run before any is pruned"
    for event in ("scored", "finished"):
        scores = [
            next(e["score"] for e in runs[way][0]["events"] if e["trial"] == 0 and e["event"] == event) for way in runs
        ]
        assert scores == pytest.approx([scores[0]] * len(scores), rel=1e-3)


def test_full_rows_are_filled(modules, tmp_path):
    """The texts on end, cut to rows, all of which are longer than a row before they are cut."""
    from jaxtune.config import load_config, with_overrides
    from jaxtune.training.opened_config import OpenedConfig

    text = {"text": " ".join(f"w{word}" for word in range(30))}
    for part, count in (("train", 40), ("validation", 20)):
        (tmp_path / f"{part}.jsonl").write_text((json.dumps(text) + "\n") * count)
    task, directory = modules["makespan_task"], tmp_path / "model"
    shape = task.SHAPES["tiny"]
    task.make_model(directory, shape, 64)
    task._word_tokenizer(shape["vocab_size"]).save_pretrained(directory)
    content = {
        "model": {"path": str(directory)},
        "data": {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "validation")} | {"completion": "{text}"},
        "train": {"steps": 1, "batch_size": 8, "sequence_length": 64},
    }
    (tmp_path / "base.yaml").write_text(json.dumps(content))
    config = load_config(tmp_path / "base.yaml")
    full = OpenedConfig(with_overrides(config, task._full_rows(config, tmp_path)))
    for examples in full.examples.values():
        assert {len(example.tokens) for example in examples} == {65}
        assert examples.truncated == len(examples) > 1


def test_figures_follow_from_the_events(modules):
    script = modules["search_makespan"]

    def run(*events, seconds):
        keys = ("seconds", "trial", "event", "step", "score")
        common = {"cpu_seconds": 1.0, "steps_run": 10, "compile_seconds": None, "peak_bytes": 1, "load_before": 0.0}
        common |= {"parts": dict.fromkeys(script.PARTS, seconds / 6), "step_seconds": seconds / 60}
        return {"seconds": seconds, "events": [dict(zip(keys, e, strict=True)) for e in events], "mfu": 0.4, **common}

    ours = run((1, 0, "scored", 2, 3.0), (2, 1, "failed", 2, None), (3, 0, "finished", 9, 2.01), seconds=4.0)
    theirs = run((5, 0, "scored", 2, 3.0), (8, 0, "finished", 9, 2.0), (10, 1, "scored", 2, 4.0), seconds=12.0)
    single = run((2, 0, "scored", 2, 3.0), (6, 0, "finished", 9, 2.5), seconds=8.0)
    found = script.summarise({"population": [ours], "single": [single], "peer": [theirs]}, population=8)
    assert found["seconds"] == {"population": 4.0, "single": 8.0, "peer": 12.0, "peer_at_fraction": None}
    assert (found["speedup_over_peer"], found["speedup_over_single"]) == (3.0, 2.0)
    assert found["speedup_over_peer_at_fraction"] is None
    ways = found["ways"]
    assert [ways[way]["seconds_to_scored"] for way in ("population", "single", "peer")] == [2, 2, 10]
    assert [ways[way]["seconds_to_good"] for way in ("population", "single", "peer")] == [3, None, 8]
    assert found["bound_over_single"] == pytest.approx(2.5), "40 % of the peak leave a factor of 2.5"
    assert found["share_of_bound"] == pytest.approx(0.8)
    assert ways["peer"]["parts"]["proposals"] == 2.0
    shown = script.as_text({"settings": {"real": found, "full": None}})
    assert max(map(len, shown.splitlines())) <= 80
    assert "not measured" in shown


def test_a_way_that_fails_leaves_what_the_others_measured(modules, capsys):
    script = modules["search_makespan"]

    def run(way):
        if way == "peer":
            raise script.WayFailed("no memory left")
        events = [{"seconds": 1.0, "trial": 0, "event": "finished", "step": 9, "score": 2.0}]
        figures = {"cpu_seconds": 1.0, "steps_run": 10, "compile_seconds": 1.0, "mfu": None, "peak_bytes": 1}
        figures |= {"parts": dict.fromkeys(script.PARTS, 0.1), "step_seconds": 0.1}
        return {"seconds": 2.0, "events": events, "load_before": 0.0, **figures}

    runs, failed = script.in_turns(script.WAYS, 2, run)
    assert failed == {"peer": "no memory left"}
    assert {way: len(found) for way, found in runs.items()} == {way: 2 * (way != "peer") for way in script.WAYS}
    assert capsys.readouterr().err.count("peer,") == 1, "it is not run again"
    found = script.summarise(runs, population=2)
    assert found["speedup_over_single"] == 1.0
    assert found["ways"]["peer"] is None
    assert script.summarise({way: [] for way in script.WAYS}, population=2)["good_loss"] is None
    text = script.as_text({"settings": {"full": found, "real": {"failed": {"prepare": "…"}}}})
    assert "1.00 × single" in text
    assert "not measured" in text


def _inside(path, name, inner):
    """``inner`` called by a function of this name in a file of this path."""
    scope = {"inner": inner}
    exec(compile(f"def {name}():\n    return inner()", path, "exec"), scope)
    return scope[name]


def test_the_innermost_known_function_says_what_a_moment_belongs_to(modules):
    parts = modules["makespan_parts"]

    def here():
        return parts.part_of(sys._getframe())

    compiling = _inside("site-packages/jax/_src/compiler.py", "compile_or_get_cached", here)
    assert here() == "other"
    assert _inside("jaxtune/training/run.py", "_loop", here)() == "steps"
    assert _inside("jaxtune/training/run.py", "_loop", compiling)() == "compiling"
    assert _inside("makespan_peer.py", "_steps", _inside("torch/nn/module.py", "forward", here))() == "steps"
    assert _inside("makespan_peer.py", "loss", here)() == "evaluation"
    assert _inside("jaxtune/search/proposals.py", "take", _inside("concurrent/futures.py", "result", here))() == (
        "proposals"
    )


def test_what_comes_before_the_first_step_is_start_up(modules):
    def wait():
        time.sleep(0.15)

    watched = modules["makespan_parts"].Parts(time.time() - 1.0)
    _inside("jaxtune/evaluation/loss.py", "evaluate_loss", wait)()
    _inside("jax/_src/compiler.py", "backend_compile", wait)()
    _inside("jaxtune/training/run.py", "_loop", wait)()
    _inside("jaxtune/evaluation/loss.py", "evaluate_loss", wait)()
    found = watched.stop()
    assert set(found) == set(modules["makespan_parts"].PARTS)
    assert 1.05 < found["start-up"] < 1.5
    for part in ("compiling", "steps", "evaluation"):
        assert 0.05 < found[part] < 0.6, part
