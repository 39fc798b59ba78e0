"""One engine as a pure state machine, after vLLM v1's scheduler (vllm/v1/core/sched/scheduler.py).

The rules: one token budget a step; running sequences first, in running order, a decode one token and an
unfinished prompt its next chunk; then the queue, first come first served or by (priority, arrival), while budget,
slots and KV blocks last. The step that finishes a prompt emits its first token. KV grows block by block; when it
runs out, the last running sequence (or the one with the largest priority value) is preempted: its blocks go, and
its prompt and answer so far are prefilled again later. Nobody is admitted in a step that preempted.

A step costs time that does not grow with the number of decodes: they run in lockstep, so a decode is only looked
at when it joins, ends, or is held up. What they need in between is kept in sums: their number, their KV, how many
of them start a new block in which step, and who ends in which step.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import Enum

from tiergate_engine.fill import Prefill, StepLimits, fill, new_blocks
from tiergate_engine.kv import BlockPool, CachingPool, Holder
from tiergate_engine.step import Step, StepTime


class EngineFull(Exception):
    """The queue is at its cap; the sequence was not taken."""


class SequenceTooLong(ValueError):
    """Prompt plus answer are longer than the model or the KV cache takes."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine's settings, named after what they limit (vLLM's names in brackets).

    Attributes:
        kv_tokens: KV capacity; only whole blocks of it are used.
        max_model_tokens: longest prompt plus answer [max_model_len].
        max_running_seqs: most sequences in one step [max_num_seqs].
        max_batched_tokens: most tokens in one step [max_num_batched_tokens].
        block_tokens: KV block size.
        priority_scheduling: order by (priority, arrival), small first, instead of arrival.
        host_step_s: host time of a step that the step-time profile does not contain.
        host_seq_s: the same for each sequence in the step.
        prefix_caching: reuse the KV of given prefix blocks and of preempted sequences.
        whole_prompt: admit a prompt only when all of it fits the free blocks [scheduler_reserve_full_isl].
        max_queued_seqs: longest queue; None is unlimited [--max-num-queued-reqs].
    """

    kv_tokens: int
    max_model_tokens: int
    max_running_seqs: int = 256
    max_batched_tokens: int = 2048
    block_tokens: int = 16
    priority_scheduling: bool = False
    host_step_s: float = 0.0
    host_seq_s: float = 0.0
    prefix_caching: bool = False
    whole_prompt: bool = True
    max_queued_seqs: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "max_model_tokens", "max_running_seqs", "max_batched_tokens", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.kv_tokens < self.block_tokens:
            raise ValueError(f"kv_tokens ({self.kv_tokens}) must hold at least one block of {self.block_tokens}")
        if not (self.host_step_s >= 0 and self.host_seq_s >= 0):
            raise ValueError("host_step_s and host_seq_s must not be negative")


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence to generate.

    Attributes:
        output_tokens: how many tokens it will really produce; only the engine knows.
        priority: smaller is served earlier (with `EngineConfig.priority_scheduling`).
        prefix_blocks: ids of the prompt's leading blocks, `block_tokens` each; equal ids are equal content.
    """

    sequence_id: str
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    prefix_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(
                f"prompt_tokens and output_tokens must be at least 1, "
                f"not {self.prompt_tokens} and {self.output_tokens}"
            )


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step that is about to run: what it holds, and how long it takes, host time included."""

    step: Step
    started_s: float
    duration_s: float

    @property
    def ends_s(self) -> float:
        return self.started_s + self.duration_s


@dataclass(frozen=True, slots=True)
class Emitted:
    """A token came out: token `index` (from zero) of its sequence."""

    sequence_id: str
    index: int
    finished: bool


class _State(Enum):
    WAITING = 0
    PREFILL = 1
    DECODE = 2
    GONE = 3


@dataclass(slots=True, eq=False)
class _Sequence:
    """A sequence's state. While it decodes, `kv` and `generated` are relative to the count of steps:
    the truth is their value plus `EngineModel.steps`."""

    spec: SequenceSpec
    holder: Holder
    target: int  # KV tokens to have before the next token comes out of a prefill
    state: _State = _State.WAITING
    kv: int = 0
    generated: int = 0
    last_step: int = -1  # the step that emits the last token
    chunk: int = 0  # tokens it prefills in the step in flight
    doomed: bool = False  # aborted while in the step in flight


class EngineModel:
    """One engine. Call `next_step`, let its duration pass, call `finish_step`; submit and abort at any time.

    `now_s` is the caller's clock and only goes forward.
    """

    def __init__(self, config: EngineConfig, step_time: StepTime) -> None:
        self.config = config
        self._step_time = step_time
        blocks = config.kv_tokens // config.block_tokens
        self._pool = CachingPool(blocks) if config.prefix_caching else BlockPool(blocks)
        self._budget = config.max_batched_tokens
        self._cap = config.max_running_seqs
        self._known: dict[str, _Sequence] = {}
        self._running: dict[str, _Sequence] = {}  # in running order
        self._queue: list[tuple[int, int, _Sequence]] = []  # a heap; aborted ones are dropped when they surface
        self._waiting = 0
        self._submitted = 0
        self._partial: list[_Sequence] = []  # running, prompt unfinished
        # The decodes in lockstep, as sums.
        self._decodes = 0
        self._decode_kv = 0
        self._block_starts = [0] * config.block_tokens  # how many decodes by kv (relative) modulo block size
        self._endings: dict[int, list[_Sequence]] = {}  # by last step; entries that moved on are stale
        # The step in flight.
        self._in_flight: PlannedStep | None = None
        self._prefilling: list[_Sequence] = []
        self._held_up: dict[str, _Sequence] = {}  # decodes without a token in the step in flight, or the last one
        self._resumed: list[_Sequence] = []  # decodes in the step in flight that were held up before it
        self._doomed: list[_Sequence] = []
        self.steps = 0
        self.preemptions = 0

    # --- what it looks like from outside -------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return self._waiting

    @property
    def kv_capacity_tokens(self) -> int:
        return self._pool.capacity * self.config.block_tokens

    @property
    def kv_used_tokens(self) -> int:
        """Tokens of the blocks in use; cached blocks that nobody uses do not count."""
        return (self._pool.capacity - self._pool.free) * self.config.block_tokens

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is in flight."""
        return not self._running and not self._waiting and self._in_flight is None

    def set_budget(self, tokens: int | None) -> None:
        """Most tokens a step may carry from the next step on; never above the engine's own. None lifts it."""
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens must be at least 1 or None, not {tokens}")
        most = self.config.max_batched_tokens
        self._budget = most if tokens is None else min(tokens, most)

    def set_running_cap(self, sequences: int | None) -> None:
        """Most sequences that may be admitted to run; those that run stay. None lifts it."""
        if sequences is not None and sequences < 0:
            raise ValueError(f"sequences must be at least 0 or None, not {sequences}")
        most = self.config.max_running_seqs
        self._cap = most if sequences is None else min(sequences, most)

    # --- sequences in and out ------------------------------------------------------------------------------

    def submit(self, spec: SequenceSpec, now_s: float) -> None:
        """Queue a sequence. Raises EngineFull, SequenceTooLong, or ValueError when its id is in use."""
        if spec.sequence_id in self._known:
            raise ValueError(f"sequence_id {spec.sequence_id!r} is in use")
        config = self.config
        total = spec.prompt_tokens + spec.output_tokens
        if total > config.max_model_tokens:
            raise SequenceTooLong(
                f"prompt ({spec.prompt_tokens}) plus output ({spec.output_tokens}) tokens exceed "
                f"the model length of {config.max_model_tokens}"
            )
        if new_blocks(0, total - 1, config.block_tokens) > self._pool.capacity:
            raise SequenceTooLong(f"{total - 1} tokens exceed the KV cache of {self.kv_capacity_tokens}")
        if config.max_queued_seqs is not None and self._waiting >= config.max_queued_seqs:
            raise EngineFull(f"{self._waiting} sequences wait, the cap is {config.max_queued_seqs}")
        self._submitted += 1
        sequence = _Sequence(spec, Holder(self._submitted, spec.prefix_blocks), spec.prompt_tokens)
        self._known[spec.sequence_id] = sequence
        self._enqueue(sequence)

    def abort(self, sequence_id: str, now_s: float) -> bool:
        """Drop a sequence; False when it is not here (any more).

        Its blocks are free at once, or at the end of the step in flight if it is in there; it emits nothing more.
        """
        sequence = self._known.pop(sequence_id, None)
        if sequence is None:
            return False
        if sequence.state is _State.WAITING:
            sequence.state = _State.GONE
            self._waiting -= 1
        elif self._in_flight is not None and (
            sequence.chunk or (sequence.state is _State.DECODE and sequence_id not in self._held_up)
        ):
            sequence.doomed = True
            self._doomed.append(sequence)
        else:
            self._unseat(sequence)
        return True

    # --- steps ---------------------------------------------------------------------------------------------

    def next_step(self, now_s: float) -> PlannedStep | None:
        """Fill the next step; None when there is nothing to run. One step at a time."""
        if self._in_flight is not None:
            raise RuntimeError("the step in flight has to be finished first")
        earlier = self._held_up
        self._held_up = {}
        preempted = self._seat_running()
        held_kv = sum(sequence.kv + self.steps for sequence in self._held_up.values())
        decodes = self._decodes - len(self._held_up)
        step = Step(decode_seqs=decodes, decode_kv_tokens=self._decode_kv - held_kv + decodes)
        step = self._seat_prefills(step, admit=not preempted)
        self._resumed = [
            sequence
            for key, sequence in earlier.items()
            if self._running.get(key) is sequence and key not in self._held_up
        ]
        if not step.tokens:
            return None
        host_s = self.config.host_step_s + self.config.host_seq_s * (step.decode_seqs + step.prefill_seqs)
        self._in_flight = PlannedStep(step, now_s, self._step_time.seconds(step) + host_s)
        return self._in_flight

    def finish_step(self, now_s: float) -> tuple[Emitted, ...]:
        """End the step in flight: every token that came out, in running order."""
        decoding = [
            sequence
            for key, sequence in self._running.items()
            if sequence.state is _State.DECODE and not sequence.doomed and key not in self._held_up
        ]
        _, prompts = self._finish(now_s)
        return tuple([self._token(sequence) for sequence in decoding] + [self._token(s) for s in prompts])

    def finish_step_milestones(self, now_s: float) -> tuple[Emitted, ...]:
        """`finish_step`, but only the tokens that cannot be inferred: its cost does not grow with the decodes.

        These are each sequence's first and last token, and the first one after a pause (a preemption, or a budget
        that did not last for all decodes). After token n, token n + k comes k steps later, up to the next
        milestone.
        """
        resumed = [sequence for sequence in self._resumed if not sequence.doomed]
        ended, prompts = self._finish(now_s)
        decoding = resumed + [sequence for sequence in ended if sequence not in resumed]
        return tuple([self._token(sequence) for sequence in decoding + prompts])

    # --- filling: the running sequences --------------------------------------------------------------------

    def _seat_running(self) -> bool:
        """Give every decode its token and block; True when somebody had to be preempted for it.

        Room for the next chunk of unfinished prompts is made too, but their blocks are taken later.
        """
        block = self.config.block_tokens
        starts = self._block_starts[-self.steps % block]
        left = self._budget - self._decodes
        if left >= 0:
            need = starts
            for sequence in self._partial:
                chunk = min(sequence.target - sequence.kv, left)
                need += new_blocks(sequence.kv, chunk, block)
                left -= chunk
            if need <= self._pool.free:
                self._pool.take(starts)
                return False
        return self._walk_running()

    def _walk_running(self) -> bool:
        """`_seat_running` one by one, when budget or blocks do not last for all.

        vLLM ends its walk when a sequence had to preempt itself, which can leave a step empty under priorities;
        here the walk goes on behind it.
        """
        block = self.config.block_tokens
        left = self._budget
        reserved = 0  # blocks for chunks
        preempted = False
        granted: dict[str, tuple[int, int]] = {}  # tokens, blocks
        for key, sequence in list(self._running.items()):
            if sequence.state is _State.WAITING:
                continue
            decode = sequence.state is _State.DECODE
            if left == 0:
                if decode:
                    self._held_up[key] = sequence
                continue
            kv = sequence.kv + self.steps if decode else sequence.kv
            tokens = 1 if decode else min(sequence.target - kv, left)
            blocks = new_blocks(kv, tokens, block)
            while blocks > self._pool.free - reserved:
                victim = self._victim()
                preempted = True
                back, taken = granted.pop(victim.spec.sequence_id, (0, 0))
                left += back
                if victim.state is _State.PREFILL:
                    reserved -= taken
                    taken = 0
                self._preempt(victim, taken)
                if victim is sequence:
                    break
            else:
                granted[key] = (tokens, blocks)
                left -= tokens
                if decode:
                    self._pool.take(blocks)
                else:
                    reserved += blocks
        return preempted

    def _victim(self) -> _Sequence:
        if self.config.priority_scheduling:
            return max(self._running.values(), key=_rank)
        return self._running[next(reversed(self._running))]

    def _preempt(self, sequence: _Sequence, extra_blocks: int) -> None:
        """Back to the queue, KV gone. `extra_blocks` were taken for the step being filled."""
        self._unseat(sequence, extra_blocks)
        sequence.target = sequence.spec.prompt_tokens + sequence.generated
        sequence.kv = 0
        self.preemptions += 1
        self._enqueue(sequence)

    # --- filling: prompts ----------------------------------------------------------------------------------

    def _seat_prefills(self, step: Step, admit: bool) -> Step:
        """Chunks for unfinished prompts, then for the queue; the step with them."""
        left = self._budget - step.tokens
        if left <= 0:
            return step
        sequences = list(self._partial)
        asks = [Prefill(sequence.target - sequence.kv, sequence.kv, admitted=True) for sequence in sequences]
        if admit and self._waiting:
            self._peek_queue(left - sum(ask.tokens for ask in asks), sequences, asks)
        if not asks:
            return step
        block = self.config.block_tokens
        limits = StepLimits(
            self._budget, self._cap - len(self._running), self._pool.free, block, self.config.whole_prompt
        )
        chosen = list(zip(sequences, asks, fill(step, asks, limits), strict=True))
        for sequence, ask, chunk in chosen:
            if not ask.admitted and chunk:
                self._pool.revive(sequence.holder, ask.context_tokens // block)
                self._waiting -= 1
                sequence.state = _State.PREFILL
                sequence.kv = ask.context_tokens
                self._running[sequence.spec.sequence_id] = sequence
                self._partial.append(sequence)
            elif not ask.admitted:
                heapq.heappush(self._queue, (*self._key(sequence), sequence))
        for sequence, ask, chunk in chosen:
            if chunk:
                self._pool.take(new_blocks(ask.context_tokens, chunk, block))
                sequence.chunk = chunk
                self._prefilling.append(sequence)
                step += Step.chunk(chunk, ask.context_tokens)
        return step

    def _peek_queue(self, wanted: int, sequences: list[_Sequence], asks: list[Prefill]) -> None:
        """Take from the queue as many as could use `wanted` tokens and a slot."""
        slots = self._cap - len(self._running)
        while wanted > 0 and slots > 0 and self._queue:
            sequence = heapq.heappop(self._queue)[2]
            if sequence.state is not _State.WAITING:
                continue
            # The last token is always computed: its logits are wanted.
            hit, unused = self._pool.hits(sequence.holder, (sequence.target - 1) // self.config.block_tokens)
            context = hit * self.config.block_tokens
            ask = Prefill(sequence.target - context, context, revived_blocks=unused)
            sequences.append(sequence)
            asks.append(ask)
            wanted -= ask.tokens
            slots -= 1

    def _key(self, sequence: _Sequence) -> tuple[int, int]:
        # A preempted sequence arrived before everybody who still waits, so arrival alone puts it in front.
        return sequence.spec.priority if self.config.priority_scheduling else 0, sequence.holder.number

    def _enqueue(self, sequence: _Sequence) -> None:
        sequence.state = _State.WAITING
        self._waiting += 1
        heapq.heappush(self._queue, (*self._key(sequence), sequence))

    # --- ending a step -------------------------------------------------------------------------------------

    def _finish(self, now_s: float) -> tuple[list[_Sequence], list[_Sequence]]:
        """The decodes that ended, and the sequences whose prefill ended: both emit a token."""
        planned = self._in_flight
        if planned is None:
            raise RuntimeError("no step is in flight")
        if now_s < planned.started_s:
            raise ValueError(f"now_s ({now_s}) is before the step's start ({planned.started_s})")
        self._in_flight = None
        self.steps += 1
        self._decode_kv += self._decodes
        for sequence in self._held_up.values():
            self._fall_back(sequence)
        for sequence in self._prefilling:
            sequence.kv += sequence.chunk
            sequence.chunk = 0
            self._pool.computed(sequence.holder, sequence.kv // self.config.block_tokens)
        for sequence in self._doomed:
            self._unseat(sequence)
        ended = [
            sequence
            for sequence in self._endings.pop(self.steps, ())
            if sequence.state is _State.DECODE and sequence.last_step == self.steps
        ]
        for sequence in ended:
            self._end(sequence)
        prompts = [s for s in self._prefilling if not s.doomed and s.kv == s.target]
        for sequence in prompts:
            self._partial.remove(sequence)
            sequence.generated += 1
            if sequence.generated == sequence.spec.output_tokens:
                self._partial.append(sequence)
                self._end(sequence)
            else:
                self._join(sequence)
        self._doomed.clear()
        self._prefilling.clear()
        return ended, prompts

    def _token(self, sequence: _Sequence) -> Emitted:
        """The token a sequence emitted in the step that just ended."""
        generated = sequence.generated + (self.steps if sequence.state is _State.DECODE else 0)
        return Emitted(sequence.spec.sequence_id, generated - 1, sequence.state is _State.GONE)

    def _end(self, sequence: _Sequence) -> None:
        del self._known[sequence.spec.sequence_id]
        self._unseat(sequence)

    # --- the decodes in lockstep ---------------------------------------------------------------------------

    def _join(self, sequence: _Sequence) -> None:
        """A prompt is done: decode from the next step on."""
        self._decodes += 1
        self._decode_kv += sequence.kv
        sequence.state = _State.DECODE
        sequence.last_step = self.steps + sequence.spec.output_tokens - sequence.generated
        sequence.kv -= self.steps
        sequence.generated -= self.steps
        self._block_starts[sequence.kv % self.config.block_tokens] += 1
        self._endings.setdefault(sequence.last_step, []).append(sequence)

    def _fall_back(self, sequence: _Sequence) -> None:
        """A decode got no token in the step that just ended."""
        block = self.config.block_tokens
        self._block_starts[sequence.kv % block] -= 1
        sequence.kv -= 1
        sequence.generated -= 1
        sequence.last_step += 1
        self._decode_kv -= 1
        self._block_starts[sequence.kv % block] += 1
        self._endings.setdefault(sequence.last_step, []).append(sequence)

    def _unseat(self, sequence: _Sequence, extra_blocks: int = 0) -> None:
        """Out of the running sequences: its blocks are free, `kv` and `generated` are its own again."""
        if sequence.state is _State.DECODE:
            self._block_starts[sequence.kv % self.config.block_tokens] -= 1
            sequence.kv += self.steps
            sequence.generated += self.steps
            self._decodes -= 1
            self._decode_kv -= sequence.kv
        else:
            self._partial.remove(sequence)
        sequence.state = _State.GONE
        del self._running[sequence.spec.sequence_id]
        self._held_up.pop(sequence.spec.sequence_id, None)
        block = self.config.block_tokens
        blocks = new_blocks(0, sequence.kv, block) + extra_blocks
        self._pool.release(sequence.holder, blocks, sequence.kv // block)


def _rank(sequence: _Sequence) -> tuple[int, int]:
    return sequence.spec.priority, sequence.holder.number
