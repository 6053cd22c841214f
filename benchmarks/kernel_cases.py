"""What benchmarks/kernels.py measures: for each kernel its operation at some shapes, in all the ways there are."""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from common import Launch, Wait

# Rows, columns into and out of a layer.
LAYERS = {
    # The shape that benchmarks/train_step.py trains on CPU.
    "laptop": {"q": (2048, 384, 384), "up": (2048, 384, 1024)},
    "small": {"layer": (64, 96, 128)},
    "qwen": {"queries": (8192, 1024, 2048), "up": (8192, 1024, 3072), "down": (8192, 3072, 1024)},
    "llama": {"attention": (8192, 4096, 4096), "up": (8192, 4096, 14336), "down": (8192, 14336, 4096)},
}
# Rows, width and vocabulary of a head.
HEADS = {
    "small": (64, 32, 500),
    "laptop": (2048, 384, 8192),
    "qwen": (8192, 1024, 151936),
    "llama": (8192, 4096, 128256),
}
BLOCK_ROWS = 8
SCALE, RATE, SEED = 0.5, 0.1, 7


class Case(NamedTuple):
    """One table of rows: an operation at a shape.

    Attributes:
      shape: what the row is called.
      flops: floating-point operations of a run.
      bytes: the fewest bytes that a run moves.
      runs: what starts a run of each implementation, and what waits for it; compiled, or the reason why it cannot be.
    """

    kernel: str
    shape: str
    flops: float
    bytes: float
    runs: dict[str, tuple[Launch, Wait] | str]


def normal(key: int, *shape: int, dtype: Any) -> jax.Array:
    """Random numbers: zeros multiply faster than data."""
    return (jax.random.normal(jax.random.key(key), shape) / math.sqrt(shape[-1])).astype(dtype)


def compile_here(function: Callable[..., Any], *operands: Any, **options: Any) -> jax.stages.Compiled | str:
    """The compiled function, or the first line of why it does not compile for the device at hand."""
    try:
        return jax.jit(function, **options).lower(*operands).compile()
    except Exception as error:  # a kernel for another platform fails in its own way
        return (str(error) or type(error).__name__).splitlines()[0]


def compiled(function: Callable[..., Any], *operands: Any) -> tuple[Launch, Wait] | str:
    """A function of fixed operands, ready to run, or why it does not compile."""
    program = compile_here(function, *operands)
    return program if isinstance(program, str) else (functools.partial(program, *operands), jax.block_until_ready)


def implementations(package: str) -> list[str]:
    """What the kernel's ``implementation=`` offers, without the definition and without names for the same thing."""
    offered = get_args(importlib.import_module(package).Implementation)
    return [name for name in offered if name not in ("reference", "pallas", "interpret")]


def low_rank(arguments: argparse.Namespace, dtype: Any) -> Iterator[Case]:
    """A layer with low-rank adapters: forward, and forward and backward for x, A and B with W frozen."""
    for label, (rows, k, n) in LAYERS[arguments.shape].items():
        for groups, rank, backward in itertools.product(arguments.groups, arguments.rank, (False, True)):
            yield _low_rank_case(label, (groups, rows // groups, k, n), rank, backward, arguments.dropout, dtype)


def _low_rank_case(
    label: str, shape: tuple[int, int, int, int], rank: int, backward: bool, dropout: bool, dtype: Any
) -> Case:
    from jaxtune_kernels import low_rank_matmul

    groups, m, k, n = shape
    x, w, g = normal(0, groups, m, k, dtype=dtype), normal(1, k, n, dtype=dtype), normal(2, groups, m, n, dtype=dtype)
    a, b = normal(3, groups, k, rank, dtype=jnp.float32), normal(4, groups, rank, n, dtype=jnp.float32)
    seeds = jnp.arange(groups, dtype=jnp.uint32) + SEED

    def ours(implementation: str) -> tuple[Launch, Wait] | str:
        def one(x: Any, a: Any, b: Any, seed: Any, w: Any) -> Any:
            drop = {"dropout_rate": RATE, "dropout_seed": seed} if dropout else {}
            return low_rank_matmul(x, w, a, b, SCALE, implementation=implementation, **drop)

        def forward(x: Any, w: Any, a: Any, b: Any, seeds: Any) -> Any:
            return jax.vmap(one, (0, 0, 0, 0, None))(x, a, b, seeds, w)

        def both(x: Any, w: Any, a: Any, b: Any, seeds: Any, g: Any) -> Any:
            y, pullback = jax.vjp(lambda x, a, b: forward(x, w, a, b, seeds), x, a, b)
            return y, pullback(g)

        return compiled(both, x, w, a, b, seeds, g) if backward else compiled(forward, x, w, a, b, seeds)

    runs = {name: ours(name) for name in implementations("jaxtune_kernels.low_rank")}
    runs["frozen matmul alone"] = compiled(_frozen_both, x, w, g) if backward else compiled(jnp.matmul, x, w)
    if groups == 1:
        runs["PEFT"] = _peft(x[0], w, a[0], b[0], g[0], backward, dropout)
    rows = groups * m
    # Backward x is read once more, for A's gradient, beside g, W and dx.
    entries = rows * (k + n) + k * n + (rows * (2 * k + n) + k * n if backward else 0)
    return Case(
        "low_rank",
        f"{label} {groups} × {m}×{k}×{n} r{rank} {'forward+backward' if backward else 'forward'}",
        2 * rows * k * n * (2 if backward else 1) + 2 * rows * rank * (k + n) * (3 if backward else 1),
        entries * x.dtype.itemsize,
        runs,
    )


def _frozen_both(x: Any, w: Any, g: Any) -> Any:
    y, pullback = jax.vjp(lambda x: x @ w, x)
    return y, pullback(g)


def _peft(x: Any, w: Any, a: Any, b: Any, g: Any, backward: bool, dropout: bool) -> tuple[Launch, Wait] | str:
    """PEFT's linear layer over torch's, with the same numbers."""
    try:
        import torch
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        return str(error)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, x.dtype.name)
    tensor = functools.partial(_tensor, device=device, dtype=dtype)
    layer = torch.nn.Linear(*w.shape, bias=False)
    model = torch.nn.Sequential(layer)
    rank = a.shape[1]
    rate = RATE if dropout else 0.0
    model = inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=SCALE * rank, lora_dropout=rate, target_modules=["0"]), model
    )
    adapted = model[0]
    adapted.base_layer.weight.data = tensor(w).T.contiguous()
    adapted.lora_A["default"].weight.data = tensor(a, dtype=torch.float32).T.contiguous()
    adapted.lora_B["default"].weight.data = tensor(b, dtype=torch.float32).T.contiguous()
    model.to(device).train()
    inputs, gradient = tensor(x).requires_grad_(backward), tensor(g)

    def launch() -> Any:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(backward):
            y = model(inputs)
        if backward:
            y.backward(gradient.to(y.dtype))
            model.zero_grad(set_to_none=True)
            inputs.grad = None
        return y

    return launch, lambda _: torch.cuda.synchronize() if device == "cuda" else None


def _tensor(array: Any, *, device: str, dtype: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(array, np.float32)).to(device, dtype)


def _liger(hidden: Any, head: Any, targets: Any) -> tuple[Launch, Wait] | str:
    """Liger's fused linear cross-entropy, which is written in Triton."""
    try:
        import torch
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "needs a GPU"
    dtype = getattr(torch, hidden.dtype.name)
    states = _tensor(hidden, device="cuda", dtype=dtype).requires_grad_()
    weight = _tensor(head, device="cuda", dtype=dtype).T.contiguous()
    classes = torch.from_numpy(np.array(targets)).to("cuda", torch.int64)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def launch() -> Any:
        value = loss(weight, states, classes)
        value.backward()
        states.grad = None
        return value

    return launch, lambda _: torch.cuda.synchronize()


def masked_update(arguments: argparse.Namespace, dtype: Any) -> Iterator[Case]:
    """AdamW over a tensor in blocks of eight rows: all of them, a half, a tenth. Beside it, optax over the tensor."""
    for label, (_, k, n) in LAYERS[arguments.shape].items():
        for share in (1.0, 0.5, 0.1):
            yield _masked_update_case(label, (k, n), share, dtype)


def _masked_update_case(label: str, shape: tuple[int, int], share: float, dtype: Any) -> Case:
    from jaxtune_kernels import masked_update
    from jaxtune_kernels.masked_update import Selection

    param, grad = normal(0, *shape, dtype=dtype), normal(1, *shape, dtype=dtype)
    blocks = shape[0] // BLOCK_ROWS
    chosen = np.sort(np.random.default_rng(0).permutation(blocks)[: round(share * blocks)]).astype(np.int32)
    selection = Selection(jnp.asarray(chosen), (BLOCK_ROWS, None))
    selected = grad.reshape(blocks, BLOCK_ROWS, shape[1])[chosen]

    def ours(implementation: str) -> tuple[Launch, Wait] | str:
        optimizer = masked_update(implementation=implementation)

        def step(state: Any, param: Any) -> Any:
            new, state = optimizer.apply(selected, state, param, 1e-4, seed=SEED)
            return state, new

        return _in_place(step, optimizer.init(param, selection), param)

    runs = {name: ours(name) for name in implementations("jaxtune_kernels.masked_update")}
    if share == 1.0:
        runs["optax"] = _optax(param, grad)
    entries = selected.size
    # The gradient is read; the parameter and two float32 moments are read and written.
    moved = entries * (3 * param.dtype.itemsize + 4 * 4)
    return Case("masked_update", f"{label} {shape[0]}×{shape[1]} {share:.0%} selected", 15 * entries, moved, runs)


def _optax(param: Any, grad: Any) -> tuple[Launch, Wait] | str:
    try:
        import optax
    except ImportError as error:
        return str(error)
    optimizer = optax.adamw(1e-4)

    def update(state: Any, param: Any) -> Any:
        changes, state = optimizer.update(grad, state, param)
        return state, optax.apply_updates(param, changes)

    return _in_place(update, optimizer.init(param.astype(jnp.float32)), param)


def _in_place(function: Callable[..., Any], state: Any, param: Any) -> tuple[Launch, Wait] | str:
    """A step that gives its operands up, as a training step does, and works on what the last one made."""
    # Copies, for the step that follows another frees them.
    held = jax.tree.map(jnp.array, (state, param))
    program = compile_here(function, *held, donate_argnums=(0, 1))
    if isinstance(program, str):
        return program

    def launch() -> Any:
        nonlocal held
        held = program(*held)
        return held

    return launch, jax.block_until_ready


def linear_cross_entropy(arguments: argparse.Namespace, dtype: Any) -> Iterator[Case]:
    """The loss under a frozen head and its gradient for the hidden states; beside full logits, Liger and tokamax."""
    from jaxtune_kernels import linear_cross_entropy

    rows, width, vocabulary = HEADS[arguments.shape]
    hidden, head = normal(0, rows, width, dtype=dtype), normal(1, width, vocabulary, dtype=dtype)
    targets = jax.random.randint(jax.random.key(2), (rows,), 0, vocabulary)

    def program(losses: Callable[..., Any]) -> tuple[Launch, Wait] | str:
        return compiled(jax.value_and_grad(lambda *v: jnp.sum(losses(*v))), hidden, head, targets)

    def ours(name: str) -> Callable[..., Any]:
        weights = jnp.ones(rows)
        return lambda hidden, head, targets: linear_cross_entropy(hidden, head, targets, weights, implementation=name)

    def whole(hidden: Any, head: Any, targets: Any) -> Any:
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]

    runs = {name: program(ours(name)) for name in implementations("jaxtune_kernels.linear_cross_entropy")}
    runs["logits in full"] = program(whole)
    runs["Liger"] = _liger(hidden, head, targets)
    try:
        import tokamax
        from absl import flags
    except ImportError as error:
        runs["tokamax"] = str(error)
    else:
        # Else it reads its settings from this script's command line.
        flags.FLAGS.mark_as_parsed()
        runs["tokamax"] = program(lambda x, w, y: tokamax.linear_softmax_cross_entropy_loss(x, y, w))
    work = 4 * rows * width * vocabulary
    moved = (2 * rows * width + width * vocabulary) * hidden.dtype.itemsize
    yield Case("linear_cross_entropy", f"head {rows}×{width}×{vocabulary} forward+backward", work, moved, runs)


KERNELS: dict[str, Callable[[argparse.Namespace, Any], Iterator[Case]]] = {
    "low_rank": low_rank,
    "masked_update": masked_update,
    "linear_cross_entropy": linear_cross_entropy,
}
