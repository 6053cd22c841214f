"""The experiments of the paper, each one command with a report."""
