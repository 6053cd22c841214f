"""The decoder: configuration, parameters, forward pass, key-value cache; reading and writing checkpoints."""

from jaxtune.models.cache import Cache, init_cache
from jaxtune.models.config import DecoderConfig, RopeConfig
from jaxtune.models.declarations import ArraySpec, Params, declare
from jaxtune.models.decoder import Adapters, Decoder, merge, split
from jaxtune.models.end_tokens import end_tokens
from jaxtune.models.head import Head
from jaxtune.models.hf_config import read_config
from jaxtune.models.linear import Adapter, LowRankAdapter
from jaxtune.models.loading import check_model, load_model, random_model, resolve_path
from jaxtune.models.saving import save_model
from jaxtune.models.tokenizer import load_tokenizer

__all__ = [
    "Adapter",
    "Adapters",
    "ArraySpec",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Head",
    "LowRankAdapter",
    "Params",
    "RopeConfig",
    "check_model",
    "declare",
    "end_tokens",
    "init_cache",
    "load_model",
    "load_tokenizer",
    "merge",
    "random_model",
    "read_config",
    "resolve_path",
    "save_model",
    "split",
]
