"""Which update methods a base of few bits takes, and which it refuses."""

from __future__ import annotations

import jax
import pytest

from jaxtune.errors import UserError
from jaxtune.models import Decoder, DecoderConfig, random_model
from jaxtune.models.declarations import declare
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.base import KERNEL, LinearTreatment, Matched
from tests.updates.treatments.test_kit import (
    LINEAR,
    OWN,
    TRAINED,
    treatment_of,
)
from tests.updates.treatments.test_kit import rule as rule_of

CONFIG = DecoderConfig(
    "qwen2", 48, 32, 64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, qkv_bias=True, initializer_range=0.3,
    quantization="nf4",
)  # fmt: skip
KERNELS = [path for path, spec in declare(CONFIG).items() if spec.quantization]
HELD = [method for method in TRAINED if issubclass(treatment_of(method), LinearTreatment) and method not in OWN]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_model(CONFIG, jax.random.key(0))


@pytest.mark.parametrize("method", TRAINED)
def test_what_trains_kernels_is_refused_and_all_else_is_taken(method, model):
    """A kernel of codes has an adapter beside it, or nothing."""
    match = OWN.get(method, LINEAR[0])
    treatment = treatment_of(method)
    layers = (0,) * CONFIG.num_layers
    if method in HELD or not any(treatment.serves(Matched(path, (2, 32, 32), (None,) * 3, layers)) for path in KERNELS):
        assert UpdatePlan([rule_of(method, match)]).resolve(model).parts
        return
    told = (
        rf"update\.0: method '{method}' trains layers\.\*\.attention\.q\{KERNEL}, which model\.quantize \(nf4\) holds "
    )
    with pytest.raises(UserError, match=told + "as codes that stay frozen; use low_rank"):
        UpdatePlan([rule_of(method, LINEAR[0])]).resolve(model)
