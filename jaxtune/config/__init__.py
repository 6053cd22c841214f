"""The configuration: its schema, reading it, and the traced hyperparameters in it."""

from jaxtune.config.hyperparameters import capacities, dotted, hyperparameters, program_key, program_name
from jaxtune.config.loading import dump_config, load_config, parse_value, with_overrides
from jaxtune.config.schema import Config

__all__ = [
    "Config",
    "capacities",
    "dotted",
    "dump_config",
    "hyperparameters",
    "load_config",
    "parse_value",
    "program_key",
    "program_name",
    "with_overrides",
]
