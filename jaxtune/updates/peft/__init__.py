"""PEFT adapter directories: their layout, writing and reading them, and the base that they name."""
