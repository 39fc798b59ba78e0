"""Keeps a replica's policy the fleet's: adopts what others change, and tells them what is changed here.

The rules (docs/state.md, "Policy in the store"):

* A store without a document is seeded from the first file that names backends; who starts later adopts it.
* A change, from the admin API or from a file that was read again, is a new version by compare-and-set.
* A replica that finds the store without a document, or with one that its own outranks, puts its own back.
* A document that cannot be used here is refused: what is in force stays in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.config import ConfigError, Settings
from gateway.policy import (
    SCHEMA,
    FleetPolicy,
    PolicyRefused,
    differences,
    policy_of,
    read_body,
    to_body,
    with_policy,
)
from state.contract import StoreUnavailable
from state.documents import Document, Documents, Draft, MemoryDocuments, Stale

log = logging.getLogger("tiergate.policy")

_TRIES = 5  # of a change whose version was taken by another that does not contradict it
_BEGIN_S = 2.0  # a store that is slower than this at the start is taken for one that is down
_AGAIN_S = 0.5
_PUT_TRIES = 3
_PUT_AGAIN_S = 0.1

Edit = Callable[[FleetPolicy], FleetPolicy]
"""Makes the policy that is wanted from the one in force; called again when that one was replaced meanwhile."""


class PolicyConflict(Exception):
    """A change could not be made: others changed the policy, or it is one that this replica cannot read."""


class PolicyNumbers(Protocol):
    """Where this is counted (`gateway.telemetry.Telemetry`)."""

    policy_version: int
    policy_refused_version: int
    policies_refused: int


def _anything(settings: Settings) -> None:
    """Every configuration that could be read is good."""


@dataclass(frozen=True, slots=True)
class PolicySource:
    """What the composition root gives for this.

    Attributes:
        documents: the fleet's document.
        check: whether a configuration can be served by here, beyond its form (profiles that are named, for one).
            May block. Raises ConfigError.
        replica: this replica's name, for people.
        adopt_file: put this replica's file into the store at the start, whatever the store has.
    """

    documents: Documents
    check: Callable[[Settings], None] = _anything
    replica: str = "this replica"
    adopt_file: bool = False


def alone() -> PolicySource:
    """For a gateway that shares nothing."""
    return PolicySource(MemoryDocuments())


@dataclass(frozen=True, slots=True)
class Begun:
    """What a replica begins with: its settings with the fleet's policy in them, and which document that is. None:
    the store did not answer or its document was refused, so it is the file's."""

    settings: Settings
    document: Document | None
    refused: Document | None = None


async def begin(file: Settings, source: PolicySource) -> Begun:
    """Seed the store from `file`, or adopt what the store has. Waits for the store two seconds at most."""
    try:
        async with asyncio.timeout(_BEGIN_S):
            return await _begin(file, source)
    except (StoreUnavailable, TimeoutError) as error:
        log.warning("the store does not answer, so the policy is that of the file until it does: %s", error)
        return Begun(file, None)


async def _begin(file: Settings, source: PolicySource) -> Begun:
    """Raises StoreUnavailable."""
    documents, mine = source.documents, policy_of(file)
    found = await documents.read()
    if not mine.backends and (found is None or source.adopt_file):
        return Begun(file, None)  # a fleet of nobody would be in the way of the next file
    while True:
        reason, expected = "seeded from the file", 0
        if found is not None:
            try:
                theirs = await _usable(file, found, source)
            except PolicyRefused as error:
                _log_refused(found, error)
                return Begun(file, None, found)
            differing = differences(mine, policy_of(theirs))
            if not differing or not source.adopt_file:
                if differing:
                    log.warning(
                        "%s is used; the file differs from it in: %s. To put the file in its place: "
                        "`tiergate serve --adopt-file`, or SIGHUP",
                        _named(found),
                        ", ".join(differing),
                    )
                return Begun(theirs, found)
            reason, expected = "the file, by --adopt-file", found.version
        answer = await documents.put(_draft(mine, source, reason), expected)
        if isinstance(answer, Document):
            log.info("policy %d in the store: %s", answer.version, reason)
            return Begun(file, answer)
        found = answer.document


async def _usable(own: Settings, document: Document, source: PolicySource) -> Settings:
    """A replica's settings with this document's policy in them. Raises PolicyRefused."""

    def use() -> Settings:
        settings = with_policy(own, read_body(document))
        if (settings.backends, settings.policy) != (own.backends, own.policy):
            source.check(settings)  # the rest has no more to it than its form
        return settings

    try:
        # Elsewhere: it may read profiles, and thousands of keys take their time.
        return await asyncio.to_thread(use)
    except ConfigError as error:
        raise PolicyRefused(str(error)) from None


class SharedPolicy:
    """One replica's side of the fleet's policy. `run` follows the store; `change` and `reload` change it."""

    def __init__(
        self,
        source: PolicySource,
        begun: Begun,
        apply: Callable[[Settings, int], Awaitable[None]],
        numbers: PolicyNumbers,
    ) -> None:
        """`apply` puts a configuration in force; it must not raise for one that `Settings` accepted."""
        self._source = source
        self._documents = source.documents
        self._apply = apply
        self._numbers = numbers
        self._settings = begun.settings
        self._document = begun.document
        self._refused: str | None = None
        self._lock = asyncio.Lock()
        if begun.document is not None:
            numbers.policy_version = begun.document.version
        if begun.refused is not None:
            self._note_refused(begun.refused)

    @property
    def document(self) -> Document | None:
        """The version in force; None while it is only the file's."""
        return self._document

    @property
    def policy(self) -> FleetPolicy:
        """The policy in force."""
        return policy_of(self._settings)

    async def history(self) -> tuple[Document, ...]:
        """The last versions, newest first. Raises StoreUnavailable."""
        return await self._documents.history()

    async def run(self) -> None:
        """Follow the store until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._documents.run(), name="documents")
            tasks.create_task(self._follow(), name="follow-policy")

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._documents.watch()) as found:
            async for document in found:
                await self._settle_until_done(document)

    async def _settle_until_done(self, document: Document | None) -> None:
        while True:
            try:
                async with self._lock:
                    await self._settle(document)
                return
            except StoreUnavailable:
                await asyncio.sleep(_AGAIN_S)
            with contextlib.suppress(StoreUnavailable):
                document = await self._documents.read()

    async def _settle(self, found: Document | None) -> None:
        """Afterwards what the store has is in force here, or was refused, or what is in force here is in the
        store. Raises StoreUnavailable."""
        have = self._document
        if have is not None and (found is None or have.outranks(found)):
            stands = await self._documents.put_back(have)
            if stands.change_id == have.change_id:
                log.warning("the store had lost policy %d: put back", have.version)
                return
            found = stands
        elif found is None:
            answer = await self._documents.put(_draft(self.policy, self._source, "seeded from the file"), 0)
            found = answer if isinstance(answer, Document) else answer.document
            if isinstance(answer, Document):
                log.info("policy %d in the store: seeded from the file", answer.version)
        if found is not None:
            await self._adopt(found)

    async def _adopt(self, found: Document) -> None:
        have = self._document
        if found.change_id == self._refused or (have is not None and found.change_id == have.change_id):
            return
        try:
            settings = await _usable(self._settings, found, self._source)
        except PolicyRefused as error:
            self._note_refused(found)
            _log_refused(found, error)
            return
        changed = differences(self.policy, policy_of(settings))
        await self._put_in_force(settings, found)
        log.info("%s is in force; it changed: %s", _named(found), ", ".join(changed) or "nothing")

    async def _put_in_force(self, settings: Settings, document: Document) -> None:
        before = self._settings.policy
        self._settings, self._document, self._refused = settings, document, None
        self._numbers.policy_version = document.version
        self._numbers.policy_refused_version = 0
        if settings.policy != before:
            log.warning(
                "`policy` takes effect when the gateway is started again; tiers, backends and keys at once"
            )
        await self._apply(settings, document.version)

    def _note_refused(self, document: Document) -> None:
        self._refused = document.change_id
        self._numbers.policies_refused += 1
        self._numbers.policy_refused_version = document.version

    async def change(self, edit: Edit, reason: str) -> Document:
        """Make a new version and put it in force, here at once; none where nothing would change.

        `edit` may raise what it likes to give up. Raises ConfigError for a policy that cannot be used,
        PolicyConflict, or StoreUnavailable: whether the change was made is then unknown until the store answers.
        """
        async with self._lock:
            for _ in range(_TRIES):
                policy = edit(self.policy)
                if self._document is not None and not differences(policy, self.policy):
                    return self._document  # somebody was first with the same
                settings = await self._checked(policy)
                answer = await self._put(_draft(policy, self._source, reason))
                if isinstance(answer, Document):
                    await self._put_in_force(settings, answer)
                    log.info("policy %d is in force: %s", answer.version, reason)
                    return answer
                await self._catch_up(answer)
        raise PolicyConflict("others keep changing the policy; try again")

    async def _put(self, draft: Draft) -> Document | Stale:
        """Ask again when the answer was lost: the same draft is put once. Raises StoreUnavailable."""
        expected = 0 if self._document is None else self._document.version
        for _ in range(_PUT_TRIES - 1):
            try:
                return await self._documents.put(draft, expected)
            except StoreUnavailable:
                await asyncio.sleep(_PUT_AGAIN_S)
        return await self._documents.put(draft, expected)

    async def _checked(self, policy: FleetPolicy) -> Settings:
        """Raises ConfigError."""
        try:
            settings = with_policy(self._settings, policy)
        except PolicyRefused as error:
            raise ConfigError(str(error)) from None
        await asyncio.to_thread(self._source.check, settings)
        return settings

    async def _catch_up(self, stale: Stale) -> None:
        """Another version is in the store: adopt it before trying again. Raises PolicyConflict."""
        await self._settle(stale.document)
        found = stale.document
        if found is not None and found.change_id == self._refused:
            raise PolicyConflict(
                f"{_named(found)} cannot be read here, so it cannot be changed here: use a replica that can"
            )

    async def restore(self, version: int) -> Document:
        """Make an earlier version's policy the newest. Raises LookupError when it is not kept any more, and as
        `change` does."""
        for document in await self._documents.history():
            if document.version == version:
                break
        else:
            raise LookupError(f"version {version} is not kept any more")
        try:
            policy = read_body(document)
        except PolicyRefused as error:
            raise ConfigError(str(error)) from None
        return await self.change(lambda now: policy, f"version {version} again")

    async def reload(self, file: Settings) -> None:
        """A file that was read again: its own settings are in force at once, its policy as a new version where it
        differs. Raises ConfigError, PolicyConflict or StoreUnavailable; the policy in force stays then."""
        wanted = policy_of(file)
        async with self._lock:
            if self._document is None:
                own = file  # the file's policy is in force until the store answers
            else:
                try:
                    own = with_policy(file, self.policy)
                except PolicyRefused as error:
                    raise ConfigError(str(error)) from None
            self._settings = own
            await self._apply(own, 0 if self._document is None else self._document.version)
            if self._document is not None and not differences(wanted, self.policy):
                return
        await self.change(lambda policy: wanted, "the file, read again")


def _draft(policy: FleetPolicy, source: PolicySource, reason: str) -> Draft:
    return Draft(secrets.token_hex(8), SCHEMA, to_body(policy), source.replica, reason)


def _named(document: Document) -> str:
    draft = document.draft
    return f"policy {document.version} ({draft.reason}, by {draft.author})"


def _log_refused(document: Document, error: PolicyRefused) -> None:
    log.error("%s in the store is refused, what is in force stays: %s", _named(document), error)
