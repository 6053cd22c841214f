"""``jaxtune study``: the table of its commands; one file each."""

from __future__ import annotations

from jaxtune.cli.dispatch import Commands

COMMANDS = {
    "status": "where a study stands, while it runs and after",
    "list": "the studies below a folder",
    "show": "one trial: configuration, curve, outcomes, the command that runs it by itself",
    "extend": "more trials or promotions, a configuration by hand, a value held fast; then go on",
    "stop": "ask the process that runs a study to save and end",
    "early-score": "train every trial to its end: how well do scores at a fraction foretell the final ones?",
    "data-size": "train on more and more documents: where do gains end, and what would more data buy?",
    "transfer": "train one design in full and cheaper: does the best configuration stay the best?",
    "methods": "search a rate for each update method, then compare them over seeds",
    "ablation": "set the winner's hyperparameters back to the reference, one at a time: which of them mattered?",
}

GROUP = Commands(
    "jaxtune study",
    "jaxtune.cli.study",
    COMMANDS,
    usage="usage: jaxtune study COMMAND RUN_DIR|CONFIG ... [--json]",
    examples=(
        "jaxtune study status runs/quickstart",
        "jaxtune study early-score quickstart.yaml",
    ),
)
