"""Batched generation with a key-value cache, compiled once per shape."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int32, Shaped

from jaxtune.errors import UserError
from jaxtune.evaluation.groups import GroupedRows, Rows
from jaxtune.evaluation.sampling import Sampling, sample
from jaxtune.models.cache import Cache
from jaxtune.models.declarations import Params
from jaxtune.models.decoder import merge
from jaxtune.models.linear import Adapter
from jaxtune.parallel.compiler_options import compiler_options
from jaxtune.parallel.sharding import TRIAL_AXIS, named_sharding, replicated

logger = logging.getLogger(__name__)

SHORTEST_BUCKET = 32
"""Prompts up to this many tokens share one compiled shape."""

FINE_FROM = 64
"""Above this many tokens there are two shapes for each doubling."""


def prompt_bucket(length: int) -> int:
    """The padded length that prompts of ``length`` tokens are computed at: 32, 64, 96, 128, 192, 256, 384, ...

    Doubling, with a step between from 64 on. A program takes seconds to compile, so short prompts, whose padding costs
    little, share few; a long prompt is padded by less than half of its length. 14 programs reach to 4096 tokens;
    multiples of 32 would be 128.
    """
    power = max(SHORTEST_BUCKET, 1 << max(length - 1, 0).bit_length())
    between = power // 4 * 3
    return between if between >= max(length, FINE_FROM) else power


def _behind_virtual(prompts: Sequence[Sequence[int]], adapters: Mapping[str, Adapter] | None) -> list[Sequence[int]]:
    """Prompts behind the positions that are an adapter's own; an empty one stays empty, and is refused."""
    count = max((adapter.virtual_tokens for adapter in (adapters or {}).values()), default=0)
    return [[*[0] * count, *prompt] if len(prompt) else prompt for prompt in prompts] if count else list(prompts)


class _Loop(NamedTuple):
    """What the decode loop carries."""

    step: Int32[Array, ""]
    tokens: Int32[Array, "*rows new"]
    counts: Int32[Array, "*rows"]
    done: Bool[Array, "*rows"]
    cache: Cache


class Generator:
    """Continues prompts with one model; adapters and parameters are arguments, so trials share its programs.

    A program is compiled for each prompt bucket (:func:`prompt_bucket`), one for greedy decoding, one for sampling, and
    one for several states side by side (:meth:`side_by_side`).
    Parameters, adapters, the tokens that end an answer and the sampling settings are traced. Prompts are sorted by
    length, so that a batch holds prompts of like length, and padded on the left. The decode loop ends when every row of
    the batch has ended.
    """

    def __init__(
        self,
        static: nnx.GraphDef,
        *,
        max_new_tokens: int,
        batch_size: int,
        eos_ids: Collection[int],
        pad_id: int,
        context: int | None = None,
        stop_ids: Collection[int] = (),
        mesh: Mesh | None = None,
    ):
        """Prepares generation; nothing is compiled before the first call.

        Args:
          static: the static part of :func:`jaxtune.models.decoder.split`.
          max_new_tokens: most tokens generated for a prompt, the ending one included.
          batch_size: rows of a batch; rounded up to a multiple of the mesh's batch shards.
          eos_ids: tokens that end an answer and do not belong to it.
          pad_id: fills up short prompts; any valid id does, as padding is never seen.
          context: positions that the model was made for. A prompt beyond them is refused; a continuation that may get
            beyond is told, once. None: any number.
          stop_ids: tokens that end an answer and belong to it, as their text may begin with the answer's last letters;
            see :func:`jaxtune.evaluation.text.stop_token_ids`.
          mesh: the mesh that the parameters lie on.
        """
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) and batch_size ({batch_size}) must be at least 1")
        shards = 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))
        self.max_new_tokens = max_new_tokens
        self.batch_size = -(-batch_size // shards) * shards
        self._shards = shards
        self.eos_ids = frozenset(eos_ids)
        self.stop_ids = frozenset(stop_ids)
        self.pad_id = pad_id
        self.context = context
        self._told = False
        self.mesh = mesh
        self._traces = 0
        self._program = jax.jit(
            functools.partial(self._generate, static),
            out_shardings=None if mesh is None else replicated(mesh),
            compiler_options=compiler_options(mesh),
        )

    @property
    def compilations(self) -> int:
        """How many programs have been traced, hence compiled, so far."""
        return self._traces

    def __call__(
        self,
        params: Params,
        adapters: dict[str, Adapter] | None,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Generates one continuation for each prompt.

        In a run of several processes all of them make the same call and all get the result.

        Args:
          params: the parameters, as :func:`jaxtune.models.decoder.split` or ``ResolvedPlan.apply`` gives them.
          adapters: low-rank adapters by module path, or None. Their structure and shapes are compiled for, their values
            are not.
          prompts: token ids of each prompt, special tokens in front included; at least one token each.
          temperature: 0 takes the likeliest token; above 0 logits are divided by it and a token is drawn.
          top_k: draw among the k likeliest tokens; 0 for all.
          top_p: draw among the fewest likeliest tokens whose probabilities sum to this (arXiv:1904.09751); 1 for all.
          seed: of the draws. A prompt's draws depend on it and on the prompt's place in ``prompts``, not on batches.

        Returns:
          Generated ids in the order of the prompts, without the end-of-text token, with the stopping token.

        Raises:
          UserError: a prompt is empty, longer than the model's context or holds an id outside the vocabulary, or a
            sampling setting is out of range.
        """
        vocabulary = params["embed.table"].shape[0]
        prompts = _behind_virtual(prompts, adapters)
        check_request(
            prompts, vocabulary, context=self.context, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        self._tell_of_context(prompts)
        ends = self._ends(vocabulary)
        sampling = None
        if temperature > 0:
            sampling = Sampling(
                temperature=np.float32(temperature),
                top_k=np.int32(top_k),
                top_p=np.float32(top_p),
                seed=np.uint32(seed),
            )
        results: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            width = prompt_bucket(len(prompts[chosen[0]]))
            batch = self._batch([[(row, prompts[row]) for row in chosen]], (1, self.batch_size), width)
            arrays = [self._placed(array[0], "batch") for array in batch]
            generated, counts = self._program(params, adapters or {}, *arrays, ends, sampling, None)
            for row, ids, count in zip(chosen, np.asarray(generated), np.asarray(counts), strict=False):
                results[row] = self._answer(ids, count)
        return results

    def side_by_side(
        self, params: Params, adapters: dict[str, Adapter], prompts: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[list[int]]]:
        """Greedy continuations by several states of one model at once: the tokens that each gives by itself.

        A batch has ``batch_size`` rows in all, in groups of equal size, as many as there are states where the rows
        allow it. A group belongs to one state, and which one is traced: one state's prompts fill a batch as those of
        all do, and how many states have prompts decides no program. A prompt's padded length depends on the prompts of
        its own state alone.

        In a run of several processes all of them make the same call and all get the result.

        Args:
          params: the parameters, the same for all.
          adapters: by module path; every array has a leading axis of states, at least one of them.
          prompts: token ids of each prompt of each state; for as many states as there are, or fewer.

        Returns:
          For each list of prompts, what :meth:`__call__` gives.

        Raises:
          UserError: a prompt is empty, longer than the model's context or holds an id outside the vocabulary.
        """
        vocabulary = params["embed.table"].shape[0]
        prompts = [_behind_virtual(each, adapters) for each in prompts]
        for each in prompts:
            check_request(each, vocabulary, context=self.context)
            self._tell_of_context(each)
        ends = self._ends(vocabulary)
        groups, size = self.groups(len(jax.tree.leaves(adapters)[0]))
        # Of each padded length, chunks of like prompts: (place in its state's order, state, prompts).
        chunks: dict[int, list[tuple[int, int, list[int]]]] = {}
        for state, each in enumerate(prompts):
            order = sorted(range(len(each)), key=lambda row: len(each[row]), reverse=True)
            for start in range(0, len(order), size):
                width = prompt_bucket(len(each[order[start]]))
                chunks.setdefault(width, []).append((start, state, order[start : start + size]))
        results: list[list[list[int]]] = [[[] for _ in each] for each in prompts]
        for width, waiting in chunks.items():
            waiting.sort()
            for first in range(0, len(waiting), groups):
                chosen = waiting[first : first + groups]
                batch = self._batch(
                    [[(row, prompts[state][row]) for row in rows] for _, state, rows in chosen], (groups, size), width
                )
                arrays = [self._placed(array, "trials", "batch") for array in batch]
                owners = np.zeros(groups, np.int32)
                owners[: len(chosen)] = [state for _, state, _ in chosen]
                generated, counts = self._program(params, adapters, *arrays, ends, None, owners)
                generated, counts = np.asarray(generated), np.asarray(counts)
                for group, (_, state, rows) in enumerate(chosen):
                    for row, ids, count in zip(rows, generated[group], counts[group], strict=False):
                        results[state][row] = self._answer(ids, count)
        return results

    def groups(self, states: int) -> tuple[int, int]:
        """How many groups a batch of several states has, and the rows of each."""
        parts = 1 if self.mesh is None else self.mesh.shape.get(TRIAL_AXIS, 1)
        groups = max(1, min(states, self.batch_size // self._shards) // parts) * parts
        return groups, max(1, self.batch_size // groups // self._shards) * self._shards

    def _ends(self, vocabulary: int) -> Bool[np.ndarray, " vocab"]:
        """Which tokens end an answer."""
        ends = np.zeros(vocabulary, bool)
        ends[sorted(token for token in self.eos_ids | self.stop_ids if token < vocabulary)] = True
        return ends

    def _answer(self, ids: Int32[np.ndarray, " new"], count: Any) -> list[int]:
        """A row's tokens without the end-of-text token."""
        answer = ids[:count].tolist()
        return answer[:-1] if answer[-1] in self.eos_ids else answer

    def _tell_of_context(self, prompts: Sequence[Sequence[int]]) -> None:
        """Says once that continuations may get to positions that the model has never seen."""
        longest = max(map(len, prompts), default=0)
        # The last generated token is never fed back.
        if self._told or self.context is None or longest + self.max_new_tokens - 1 <= self.context:
            return
        self._told = True
        logger.warning(
            "a prompt of %d tokens and %d new ones may get beyond the model's context of %d positions, which it was "
            "not made for",
            longest,
            self.max_new_tokens,
            self.context,
        )

    def _batch(
        self, groups: Sequence[Sequence[tuple[int, Sequence[int]]]], shape: tuple[int, int], width: int
    ) -> tuple[Int32[np.ndarray, "g b s"], Int32[np.ndarray, "g b"], Int32[np.ndarray, "g b"]]:
        """Left-padded tokens, prompt lengths, and each row's place among the prompts (-1: an empty row).

        Args:
          groups: the prompts of each group, with their places.
          shape: groups, and rows of each.
          width: padded length.
        """
        tokens = np.full((*shape, width), self.pad_id, np.int32)
        lengths = np.ones(shape, np.int32)
        rows = np.full(shape, -1, np.int32)
        for group, prompts in enumerate(groups):
            for row, (place, prompt) in enumerate(prompts):
                tokens[group, row, width - len(prompt) :] = prompt
                lengths[group, row], rows[group, row] = len(prompt), place
        return tokens, lengths, rows

    def _placed(self, array: Shaped[np.ndarray, "..."], *axes: str) -> Shaped[Array, "..."]:
        """The host array, the same in every process, its first dimensions cut over the mesh by their logical axes."""
        if self.mesh is None:
            return jnp.asarray(array)
        sharding = named_sharding((*axes, *[None] * (array.ndim - len(axes))), array.shape, self.mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def _generate(
        self,
        static: nnx.GraphDef,
        params: Params,
        adapters: dict[str, Adapter],
        prompts: Int32[Array, "*rows s"],
        lengths: Int32[Array, "*rows"],
        rows: Int32[Array, "*rows"],
        ends: Bool[Array, " vocab"],
        sampling: Sampling | None,
        owners: Int32[Array, " groups"] | None,
    ) -> tuple[Int32[Array, "*rows new"], Int32[Array, "*rows"]]:
        """The program: prefill, then one token for every row until all are done. Gives tokens and their counts.

        Rows are ``[b]``, or ``[groups, b]`` where groups have owners.
        """
        self._traces += 1  # A side effect of tracing on purpose: it runs once for each program.
        merged = merge(static, params)
        model = Rows(merged, adapters) if owners is None else GroupedRows(merged, adapters, owners, self.mesh)
        width = prompts.shape[-1]
        keys = (
            None if sampling is None else jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), rows)
        )

        def choose(states: Float[Array, "*rows 1 d"], step: Int[Array, ""]) -> Int32[Array, "*rows"]:
            logits = model.logits(states)[..., 0, :]
            if sampling is None or keys is None:
                return jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return sample(logits, sampling, jax.vmap(jax.random.fold_in, (0, None))(keys, step))

        segments = (jnp.arange(width) >= width - lengths[..., None]).astype(jnp.int32)
        # The last generated token is never fed back, hence one slot less.
        cache = model.empty_cache(prompts.shape[-2], width + self.max_new_tokens - 1)
        states, cache = model.extend(prompts, cache, segments)
        first = choose(states[..., -1:, :], jnp.int32(0))
        empty = rows < 0
        start = _Loop(
            step=jnp.int32(1),
            tokens=jnp.full((*rows.shape, self.max_new_tokens), self.pad_id, jnp.int32).at[..., 0].set(first),
            counts=jnp.ones_like(lengths),
            done=ends[first] | empty,
            cache=cache,
        )

        def more(loop: _Loop) -> Bool[Array, ""]:
            return (loop.step < self.max_new_tokens) & ~jnp.all(loop.done)

        def decode(loop: _Loop) -> _Loop:
            last = jax.lax.dynamic_slice_in_dim(loop.tokens, loop.step - 1, 1, axis=-1)
            states, cache = model.extend(last, loop.cache)
            token = choose(states, loop.step)
            return _Loop(
                step=loop.step + 1,
                tokens=loop.tokens.at[..., loop.step].set(token),
                counts=loop.counts + ~loop.done,
                done=loop.done | ends[token],
                cache=cache,
            )

        final = jax.lax.while_loop(more, decode, start)
        return final.tokens, final.counts


def check_request(
    prompts: Sequence[Sequence[int]],
    vocabulary: int,
    *,
    context: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Checks the arguments of a call of :class:`Generator` for a model of so many tokens and positions.

    Raises:
      UserError: as there.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty: generation needs at least one token to begin with")
        if context is not None and len(prompt) > context:
            raise UserError(
                f"prompt {number} takes {len(prompt)} tokens, more than the model's context of {context} positions; "
                "shorten it"
            )
        wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise UserError(f"prompt {number} holds token id {wrong}, but the model's vocabulary has {vocabulary}")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be finite and not negative, got {temperature}")
    if not 0 <= top_k < 2**31:
        raise UserError(f"top_k must be at least 1, or 0 for all tokens, got {top_k}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be at least 0 and less than 2^32, got {seed}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}")
