"""The decodes of one engine as sums, so that a step costs the same for three of them or three hundred.

Every decode takes one token in every step, so all of them stay in step with the count of steps, and all that can
happen to one of them is known when it joins: the step in which it ends, and (modulo the block size) the steps in
which it starts a new KV block. A decode that is held up for a step is moved by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from tiergate_engine.contract import SequenceSpec
from tiergate_engine.kv import Holder


class State(Enum):
    WAITING = 0
    PREFILL = 1
    DECODE = 2
    GONE = 3


@dataclass(slots=True, eq=False)
class LiveSequence:
    """A sequence inside the engine. Call it a decode's truth only through `Lockstep`: while it decodes, `kv` and
    `generated` are short of the truth by the count of steps.

    Attributes:
        target: KV tokens to have before the next token comes out of its prefill.
        received: prompt tokens whose KV came from another engine and has not been dropped.
        last_step: the count of steps after which its last token is out, while it decodes.
        chunk: tokens it prefills in the step that is being filled or in flight.
        doomed: aborted while in the step in flight.
        relegated: its promise is given up.
        due_key_s: when its next token is due, short of the truth by a pace for each step, while it decodes; kept
            by `DueTimes`.
    """

    spec: SequenceSpec
    holder: Holder
    target: int
    received: int = 0
    state: State = State.WAITING
    kv: int = 0
    generated: int = 0
    last_step: int = -1
    chunk: int = 0
    doomed: bool = False
    relegated: bool = False
    due_key_s: float = math.inf

    @property
    def sequence_id(self) -> str:
        return self.spec.sequence_id


class Follower(Protocol):
    """Follows who decodes."""

    def add(self, sequence: LiveSequence) -> None: ...

    def drop(self, sequence: LiveSequence) -> None: ...


class Lockstep:
    """All decodes. `steps` counts the steps that ended, `seqs` and `kv_tokens` are sums over the decodes; `due`
    is told who comes and goes."""

    def __init__(self, block_tokens: int) -> None:
        self.steps = 0
        self.seqs = 0
        self.kv_tokens = 0
        self.due: Follower | None = None
        self._block_tokens = block_tokens
        self._starters = [0] * block_tokens  # decodes by `kv` modulo block size
        self._endings: dict[int, list[LiveSequence]] = {}  # by last step; an entry that moved on is stale

    @property
    def block_starts(self) -> int:
        """How many decodes need a new block for the next token."""
        return self._starters[-self.steps % self._block_tokens]

    def starts_block(self, sequence: LiveSequence) -> bool:
        """Whether one decode needs a new block for the next token."""
        return not self.kv_of(sequence) % self._block_tokens

    def kv_of(self, sequence: LiveSequence) -> int:
        return sequence.kv + self.steps

    def generated_of(self, sequence: LiveSequence) -> int:
        return sequence.generated + self.steps

    def join(self, sequence: LiveSequence) -> None:
        """Decode from the next step on."""
        self.seqs += 1
        self.kv_tokens += sequence.kv
        sequence.state = State.DECODE
        sequence.last_step = self.steps + sequence.spec.output_tokens - sequence.generated
        sequence.kv -= self.steps
        sequence.generated -= self.steps
        self._starters[sequence.kv % self._block_tokens] += 1
        self._endings.setdefault(sequence.last_step, []).append(sequence)
        if self.due is not None:
            self.due.add(sequence)

    def leave(self, sequence: LiveSequence) -> None:
        """Decode no longer; `kv` and `generated` are the truth again. The caller sets the state."""
        if self.due is not None:
            self.due.drop(sequence)
        self._starters[sequence.kv % self._block_tokens] -= 1
        sequence.kv += self.steps
        sequence.generated += self.steps
        self.seqs -= 1
        self.kv_tokens -= sequence.kv

    def step(self) -> None:
        """A step ended: everybody has one more token."""
        self.steps += 1
        self.kv_tokens += self.seqs

    def fall_back(self, sequence: LiveSequence) -> None:
        """One decode got no token in the step that just ended."""
        if self.due is not None:
            self.due.drop(sequence)
        self._starters[sequence.kv % self._block_tokens] -= 1
        sequence.kv -= 1
        sequence.generated -= 1
        sequence.last_step += 1
        self.kv_tokens -= 1
        self._starters[sequence.kv % self._block_tokens] += 1
        self._endings.setdefault(sequence.last_step, []).append(sequence)
        if self.due is not None:
            self.due.add(sequence)

    def ended(self) -> list[LiveSequence]:
        """The decodes whose last token came out in the step that just ended. Ask once a step."""
        return [
            sequence
            for sequence in self._endings.pop(self.steps, ())
            # Whoever left or fell back and comes again ends later than before, so an old entry cannot match.
            if sequence.state is State.DECODE and sequence.last_step == self.steps
        ]
