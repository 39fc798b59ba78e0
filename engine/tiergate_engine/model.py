"""One engine as a pure state machine, after vLLM v1's scheduler (vllm/v1/core/sched/scheduler.py).

The rules: one token budget a step; running sequences first, in running order, a decode one token and an
unfinished prompt its next chunk; then the queue, first come first served or by (priority, arrival), while budget,
slots and KV blocks last. The step that finishes a prompt emits its first token. KV grows block by block; when it
runs out, the last running sequence (or the one with the largest priority value) is preempted: its blocks go, and
its prompt and answer so far are prefilled again later. Nobody is admitted in a step that preempted.

A driven engine (`EngineConfig.drive`) keeps promises instead (`tiergate_engine.drive`): queue and chunks go by
deadline, the step is as long as the slack on board allows, and loose decodes may be left out of it.

A step costs time that does not grow with the number of decodes: they run in lockstep, so a decode is only looked
at when it joins, ends, or is held up. What they need in between is kept in sums: their number, their KV, how many
of them start a new block in which step, and who ends in which step.
"""

from __future__ import annotations

from dataclasses import replace

from tiergate_engine.contract import (
    MIN_CHUNK_TOKENS,
    Emitted,
    EngineConfig,
    EngineFull,
    PlannedStep,
    SequenceSpec,
    SequenceTooLong,
    check_size,
)
from tiergate_engine.drive import Ruled, timed
from tiergate_engine.driver import Driver, Plan
from tiergate_engine.fill import Prefill, StepLimits, fill, new_blocks
from tiergate_engine.kv import BlockPool, CachingPool, Holder
from tiergate_engine.lockstep import LiveSequence, Lockstep, State
from tiergate_engine.step import Step, StepTime
from tiergate_engine.waiting import Waiting, by_arrival, by_deadline, by_priority, by_relegation

__all__ = [
    "Emitted",
    "EngineConfig",
    "EngineFull",
    "EngineModel",
    "PlannedStep",
    "SequenceSpec",
    "SequenceTooLong",
]


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
        self._pace_s: float | None = None
        self._cap = config.max_running_seqs
        self._known: dict[str, LiveSequence] = {}
        self._running: dict[str, LiveSequence] = {}  # in running order
        if config.drive is not None:
            key = by_deadline if config.drive.deadline_order else by_relegation
        else:
            key = by_priority if config.priority_scheduling else by_arrival
        self._queue = Waiting(key)
        self._waiting = 0
        self._submitted = 0
        self._partial: list[LiveSequence] = []  # running, prompt unfinished
        self._decodes = Lockstep(config.block_tokens)
        self._driver = None if config.drive is None else Driver(Ruled(config.drive, step_time), self._decodes)
        # The step in flight.
        self._in_flight: PlannedStep | None = None
        self._prefilling: list[LiveSequence] = []
        self._held_up: dict[str, LiveSequence] = {}  # decodes left out of the step in flight, or the last
        self._resumed: list[LiveSequence] = []  # decodes in the step in flight that were held up before it
        self._doomed: list[LiveSequence] = []
        self.preemptions = 0

    # --- what it looks like from outside -------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps that ended."""
        return self._decodes.steps

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def decodes(self) -> int:
        """Sequences that want a token of every step."""
        return self._decodes.seqs

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

    def set_pace(self, seconds: float | None) -> None:
        """Most seconds a step with prompt chunks may take, from the next step on: chunks are cut to it (dynamic
        chunking, PolyServe §4.7). Decodes always go. None lifts it."""
        if seconds is not None and not seconds > 0.0:
            raise ValueError(f"seconds must be positive or None, not {seconds}")
        self._pace_s = seconds

    def set_running_cap(self, sequences: int | None) -> None:
        """Most sequences that may be admitted to run; those that run stay. None lifts it."""
        if sequences is not None and sequences < 0:
            raise ValueError(f"sequences must be at least 0 or None, not {sequences}")
        most = self.config.max_running_seqs
        self._cap = most if sequences is None else min(sequences, most)

    def drive_by(self, ruled: Ruled) -> None:
        """Plan by these rules and step times from the next step on. Raises ValueError for a stock engine."""
        if self._driver is None:
            raise ValueError("a stock engine is not driven: give it EngineConfig.drive")
        self._driver.rule(ruled)

    def decode_progress(self) -> list[tuple[str, int]]:
        """Every running decode with the tokens it has made so far."""
        steps = self.steps
        return [
            (key, sequence.generated + steps)
            for key, sequence in self._running.items()
            if sequence.state is State.DECODE
        ]

    def preempted_progress(self) -> list[tuple[str, int]]:
        """Every sequence that was preempted and does not decode again yet, with the tokens it has made so far."""
        return [
            (key, sequence.generated)
            for key, sequence in self._known.items()
            if sequence.generated and sequence.state is not State.DECODE
        ]

    @property
    def held_up(self) -> int:
        """Decodes that were left out of the step in flight, or of the last one."""
        return len(self._held_up)

    # --- sequences in and out ------------------------------------------------------------------------------

    def submit(self, spec: SequenceSpec, now_s: float) -> None:
        """Queue a sequence. Raises EngineFull, SequenceTooLong, or ValueError when its id is in use."""
        if spec.sequence_id in self._known:
            raise ValueError(f"sequence_id {spec.sequence_id!r} is in use")
        config = self.config
        check_size(spec, config, self._pool.capacity)
        if config.max_queued_seqs is not None and self._waiting >= config.max_queued_seqs:
            raise EngineFull(f"{self._waiting} sequences wait, the cap is {config.max_queued_seqs}")
        self._submitted += 1
        holder = Holder(self._submitted, spec.prefix_blocks)
        sequence = LiveSequence(spec, holder, spec.prompt_tokens, spec.received_tokens, relegated=spec.relegated)
        self._known[spec.sequence_id] = sequence
        self._waiting += 1
        if config.async_scheduling and self._in_flight is not None:
            self._queue.push_late(sequence)
        else:
            self._queue.push(sequence)

    def abort(self, sequence_id: str, now_s: float) -> bool:
        """Drop a sequence; False when it is not here (any more).

        Its blocks are free at once, or at the end of the step in flight if it is in there; it emits nothing more.
        """
        sequence = self._known.pop(sequence_id, None)
        if sequence is None:
            return False
        if sequence.state is State.WAITING:
            sequence.state = State.GONE
            self._waiting -= 1
        elif self._in_flight is not None and (
            sequence.chunk or (sequence.state is State.DECODE and sequence_id not in self._held_up)
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
        if not self._running:
            self._queue.let_late_in()
        earlier = self._held_up
        self._held_up = {}
        plan = None if self._driver is None else self._plan(self._driver, now_s)
        preempted = self._seat_running()
        held_kv = sum(map(self._decodes.kv_of, self._held_up.values())) if self._held_up else 0
        seqs = self._decodes.seqs - len(self._held_up)
        step = Step.decode(seqs, self._decodes.kv_tokens - held_kv + seqs)  # with the token being computed
        if self._driver is None or plan is None:
            step = self._seat_prefills(step, admit=not preempted, now_s=now_s)
        else:
            step = self._seat_planned(step, self._driver, plan, admit=not preempted)
        self._queue.let_late_in()
        self._resumed = [
            sequence
            for key, sequence in earlier.items()
            if self._running.get(key) is sequence and key not in self._held_up
        ]
        if not step.tokens:
            return None
        host_s = self.config.host_seconds(step.decode_seqs + step.prefill_seqs)
        self._in_flight = PlannedStep(step, now_s, self._step_time.seconds(step) + host_s)
        return self._in_flight

    def finish_step(self, now_s: float) -> tuple[Emitted, ...]:
        """End the step in flight: every token that came out, in running order."""
        steps = self.steps
        tokens = [
            Emitted(key, sequence.generated + steps, sequence.last_step == steps + 1)
            for key, sequence in self._running.items()
            if sequence.state is State.DECODE and not sequence.doomed and key not in self._held_up
        ]
        _, prompts = self._finish(now_s)
        tokens.extend(map(self._token, prompts))
        return tuple(tokens)

    def finish_step_milestones(self, now_s: float) -> tuple[Emitted, ...]:
        """`finish_step`, but only the tokens that cannot be inferred: its cost does not grow with the decodes.

        These are each sequence's first and last token, and the first one after a pause (a preemption, or a budget
        that did not last for all decodes). After token n, token n + k comes k steps later, up to the next
        milestone.
        """
        resumed = [sequence for sequence in self._resumed if not sequence.doomed]
        ended, prompts = self._finish(now_s)
        if resumed:
            ended = resumed + [sequence for sequence in ended if sequence not in resumed]
        return tuple(map(self._token, ended + prompts))

    # --- filling: the running sequences --------------------------------------------------------------------

    def _seat_running(self) -> bool:
        """Give every decode its token and block; True when somebody had to be preempted for it.

        Room for the next chunk of unfinished prompts is made too, but their blocks are taken later.
        """
        block = self.config.block_tokens
        starts = self._decodes.block_starts - sum(map(self._decodes.starts_block, self._held_up.values()))
        seqs = self._decodes.seqs - len(self._held_up)
        left = self._budget - seqs
        if left >= 0:
            need = starts
            # A driven engine's prompts take what there is as long as decodes go on, which end some time.
            for sequence in self._partial if self._driver is None or not seqs else ():
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
            if sequence.state is State.WAITING or key in self._held_up:
                continue
            decode = sequence.state is State.DECODE
            if left == 0:
                if decode:
                    self._held_up[key] = sequence
                continue
            kv = self._decodes.kv_of(sequence) if decode else sequence.kv
            tokens = 1 if decode else min(sequence.target - kv, left)
            blocks = new_blocks(kv, tokens, block)
            while blocks > self._pool.free - reserved:
                victim = self._victim()
                preempted = True
                back, taken = granted.pop(victim.sequence_id, (0, 0))
                left += back
                if victim.state is State.PREFILL:
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
                    # A preemption may give budget back, but as in vLLM the chunk it made room for stays as it is.
                    sequence.chunk = tokens
                    reserved += blocks
        return preempted

    def _victim(self) -> LiveSequence:
        if self.config.priority_scheduling:
            return max(self._running.values(), key=by_priority)
        return self._running[next(reversed(self._running))]

    def _preempt(self, sequence: LiveSequence, extra_blocks: int) -> None:
        """Back to the queue, KV gone. `extra_blocks` were taken for the step being filled."""
        self._unseat(sequence, extra_blocks)
        sequence.target = sequence.spec.prompt_tokens + sequence.generated
        sequence.kv = sequence.chunk = sequence.received = 0
        self.preemptions += 1
        sequence.state = State.WAITING
        self._waiting += 1
        self._queue.push(sequence)

    # --- filling: prompts ----------------------------------------------------------------------------------

    def _plan(self, driver: Driver, now_s: float) -> Plan:
        """What a driven engine does in the next step; decodes that are left out of it are held up."""
        sequences = list(self._partial)
        asks = [driver.promised(s, Prefill(s.target - s.kv, s.kv, admitted=True), now_s) for s in sequences]
        if self._waiting:
            self._peek_queue(self._budget - self._decodes.seqs, sequences, asks, now_s)
        plan = driver.plan(self._running.values(), sequences, asks, self._limits(self._pace_s), now_s)
        self._held_up = {sequence.sequence_id: sequence for sequence in plan.left_out}
        return plan

    def _seat_planned(self, step: Step, driver: Driver, plan: Plan, admit: bool) -> Step:
        """The prompts' part of a plan. When somebody was preempted for the decodes, nobody is admitted."""
        sequences, asks = plan.sequences, plan.asks
        if not admit:
            for sequence, ask in zip(sequences, asks, strict=True):
                if not ask.admitted:
                    self._queue.push(sequence)
            stay = [i for i, s in enumerate(sequences) if asks[i].admitted and s.state is State.PREFILL]
            sequences, asks = [sequences[i] for i in stay], [asks[i] for i in stay]
        limits = timed(self._limits(self._pace_s), plan.room)
        return self._share(step, sequences, asks, limits, driver.step_time.rules.floor_tokens)

    def _seat_prefills(self, step: Step, admit: bool, now_s: float) -> Step:
        """Chunks for unfinished prompts, then for the queue; the step with them."""
        left = self._budget - step.tokens
        if left <= 0:
            return step
        sequences = list(self._partial)
        asks = [Prefill(s.chunk or s.target - s.kv, s.kv, admitted=True) for s in sequences]
        if admit and self._waiting:
            self._peek_queue(left - sum(ask.tokens for ask in asks), sequences, asks, now_s)
        within_s = None if self._pace_s is None else self._pace_s - self.config.host_seconds(step.decode_seqs + 1)
        return self._share(step, sequences, asks, self._limits(within_s), MIN_CHUNK_TOKENS)

    def _limits(self, within_s: float | None) -> StepLimits:
        config = self.config
        slots = self._cap - len(self._running)
        return StepLimits(self._budget, slots, self._pool.free, config.block_tokens, config.whole_prompt, within_s)

    def _share(
        self, step: Step, sequences: list[LiveSequence], asks: list[Prefill], limits: StepLimits, floor_tokens: int
    ) -> Step:
        """Give prompts their chunks; the step with them. Whoever is not admitted goes back to the queue."""
        if not asks:
            return step
        block = self.config.block_tokens
        step_time = self._step_time if self._driver is None else self._driver.step_time
        chunks = fill(step, asks, limits, step_time=step_time)
        if not step.tokens and not any(chunks):
            # Nobody decodes and not even one token keeps the pace: without a step the engine would never go on.
            chunks = fill(step, asks, replace(limits, tokens=floor_tokens, within_s=None))
        chosen = list(zip(sequences, asks, chunks, strict=True))
        for sequence, ask, chunk in chosen:
            if not ask.admitted and chunk:
                if sequence.received:
                    self._pool.take(ask.revived_blocks)
                else:
                    self._pool.revive(sequence.holder, ask.context_tokens // block)
                self._waiting -= 1
                sequence.state = State.PREFILL
                sequence.kv = ask.context_tokens
                self._running[sequence.sequence_id] = sequence
                self._partial.append(sequence)
            elif not ask.admitted:
                self._queue.push(sequence)
        for sequence, ask, chunk in chosen:
            sequence.chunk = chunk
            if chunk:
                self._pool.take(new_blocks(ask.context_tokens, chunk, block))
                self._prefilling.append(sequence)
                step += Step.chunk(chunk, ask.context_tokens)
        return step

    def _peek_queue(self, wanted: int, sequences: list[LiveSequence], asks: list[Prefill], now_s: float) -> None:
        """Take from the queue as many as could use `wanted` tokens and a slot."""
        slots = self._cap - len(self._running)
        while wanted > 0 and slots > 0 and (sequence := self._queue.pop()) is not None:
            # The last token is always computed: its logits are wanted.
            if sequence.received:
                context = min(sequence.received, sequence.target - 1)
                unused = new_blocks(0, context, self.config.block_tokens)
            else:
                hit, unused = self._pool.hits(sequence.holder, (sequence.target - 1) // self.config.block_tokens)
                context = hit * self.config.block_tokens
            ask = Prefill(sequence.target - context, context, revived_blocks=unused)
            if self._driver is not None:
                ask = self._driver.promised(sequence, ask, now_s)
                if self._driver.is_late(ask):
                    sequence.relegated = True
                    self._queue.push(sequence)
                    continue
            sequences.append(sequence)
            asks.append(ask)
            wanted -= ask.tokens
            slots -= 1

    # --- ending a step -------------------------------------------------------------------------------------

    def _finish(self, now_s: float) -> tuple[list[LiveSequence], list[LiveSequence]]:
        """The decodes that ended, and the sequences whose prefill ended: both emit a token."""
        planned = self._in_flight
        if planned is None:
            raise RuntimeError("no step is in flight")
        if now_s < planned.started_s:
            raise ValueError(f"now_s ({now_s}) is before the step's start ({planned.started_s})")
        self._in_flight = None
        self._decodes.step()
        for sequence in self._held_up.values():
            self._decodes.fall_back(sequence)
        for sequence in self._prefilling:
            sequence.kv += sequence.chunk
            sequence.chunk = 0
            self._pool.computed(sequence.holder, sequence.kv // self.config.block_tokens)
        for sequence in self._doomed:
            self._unseat(sequence)
        ended = self._decodes.ended()
        for sequence in ended:
            self._end(sequence)
        prompts = [s for s in self._prefilling if not s.doomed and s.kv == s.target]
        for sequence in prompts:
            sequence.generated += 1
            if sequence.generated == sequence.spec.output_tokens:
                self._end(sequence)
            else:
                self._partial.remove(sequence)
                self._decodes.join(sequence)
        self._doomed.clear()
        self._prefilling.clear()
        return ended, prompts

    def _token(self, sequence: LiveSequence) -> Emitted:
        """The token a sequence emitted in the step that just ended."""
        decodes = sequence.state is State.DECODE
        generated = self._decodes.generated_of(sequence) if decodes else sequence.generated
        return Emitted(sequence.sequence_id, generated - 1, finished=not decodes)

    def _end(self, sequence: LiveSequence) -> None:
        del self._known[sequence.sequence_id]
        self._unseat(sequence)

    def _unseat(self, sequence: LiveSequence, extra_blocks: int = 0) -> None:
        """Out of the running sequences: its blocks are free, `kv` and `generated` are its own again."""
        if sequence.state is State.DECODE:
            self._decodes.leave(sequence)
        else:
            self._partial.remove(sequence)
        sequence.state = State.GONE
        del self._running[sequence.sequence_id]
        self._held_up.pop(sequence.sequence_id, None)
        block = self.config.block_tokens
        blocks = new_blocks(0, sequence.kv, block) + extra_blocks
        self._pool.release(sequence.holder, blocks, sequence.kv // block)
