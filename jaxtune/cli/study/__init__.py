"""``jaxtune study``: the table of its commands; one file each."""

from __future__ import annotations

from jaxtune.cli.dispatch import Commands

COMMANDS = {
    "early-score": "train every trial to its end: how well do scores at a fraction foretell the final ones?",
    "data-size": "train on more and more documents: where do gains end, and what would more data buy?",
    "transfer": "train one design in full and cheaper: does the best configuration stay the best?",
    "ablation": "set the winner's hyperparameters back to the reference, one at a time: which of them mattered?",
}

GROUP = Commands(
    "jaxtune study",
    "jaxtune.cli.study",
    COMMANDS,
    usage="usage: jaxtune study COMMAND CONFIG [key=value ...] [--json]",
    examples=("jaxtune study early-score configs/studies/early-score.yaml",),
)
