"""Evaluation: loss with its standard error, batched generation, and task metrics of the generated answers."""
