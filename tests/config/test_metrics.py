"""The table of metrics against what is measured, and goals against plain comparisons."""

import math
from typing import get_args

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jaxtune.config.experiments import DataSizeConfig
from jaxtune.config.metrics import METRICS, TASKS, Goal, check_measured, task_metrics
from jaxtune.config.schema import EvaluationConfig
from jaxtune.config.search_section import SearchConfig
from jaxtune.errors import UserError
from jaxtune.evaluation.evaluator import EvaluatorResult
from jaxtune.evaluation.extraction import extraction_metrics
from jaxtune.telemetry.progress import short

numbers = st.floats(-1e6, 1e6)
answers = st.lists(st.tuples(*[st.sampled_from(["a", "b", "n/a", ""])] * 2, st.sampled_from("xy")), min_size=1)


@given(numbers, numbers)
def test_goals_order_scores_as_plain_comparisons_do(score: float, other: float):
    low, high = Goal("min"), Goal("max")
    assert low.better(score, other) == (score < other)
    assert high.better(score, other) == (score > other)
    assert low.gain(score, other) == score - other == -high.gain(score, other)
    assert high.signed(high.signed(score)) == score
    assert low.signed(math.inf) == math.inf == -high.signed(math.inf)
    assert (low.words, high.words) == ("lower is better", "higher is better")


@settings(max_examples=25)
@given(answers)
def test_a_task_declares_what_it_measures_within_bounds_that_only_right_answers_reach(rows):
    predictions, references, attributes = zip(*rows, strict=True)
    declared = TASKS["extraction"]
    measured = extraction_metrics(predictions, references, attributes).metrics
    perfect = extraction_metrics(references, references, attributes).metrics
    assert measured.keys() == declared.keys()
    for name, metric in declared.items():
        assert metric.low is not None
        assert metric.high is not None
        assert metric.low <= measured[name] <= metric.high
        assert not metric.goal.better(measured[name], perfect[name])
        if perfect[name]:
            assert perfect[name] == metric.best


def test_the_configuration_takes_its_choices_from_the_table():
    assert get_args(SearchConfig.model_fields["objective"].annotation) == tuple(METRICS)
    assert get_args(EvaluationConfig.model_fields["task"].annotation) == ("none", *TASKS)
    # What is compared example by example is what an evaluation tells by example, and the loss.
    told = {name for name in METRICS if EvaluatorResult({}, {}, {}, []).per_example(name)} | {"loss"}
    assert set(get_args(DataSizeConfig.model_fields["score"].annotation)) == told


def test_a_metric_that_the_task_does_not_measure_is_refused():
    check_measured("loss", "none", "search.objective")
    check_measured("f1", "extraction", "search.objective")
    with pytest.raises(UserError, match=r"search\.objective: 'f1' needs evaluation\.task, which is 'none'"):
        check_measured("f1", "none", "search.objective")
    with pytest.raises(UserError, match=r"does not measure 'f1_micro'.*f1"):
        check_measured("f1_micro", "extraction", "search.objective")
    assert set(task_metrics("none")) == {"loss"}


def test_a_line_of_progress_names_what_is_logged():
    line = short({"loss": 1.5, "validation_loss": 1.25, "exact_match": 0.5, "f1": 0.25})
    assert line == "loss 1.5000  validation loss 1.2500  exact match 0.500"
