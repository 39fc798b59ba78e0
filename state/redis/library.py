"""The scripts of the store, by name."""

from __future__ import annotations

from dataclasses import dataclass

from state.redis.scripts import Script, load_script


@dataclass(frozen=True, slots=True)
class Library:
    """Each is told in its file what it takes and answers."""

    reserve: Script
    release: Script
    publish: Script
    announce: Script
    add: Script
    remove: Script
    move: Script
    view: Script
    note: Script
    beat: Script
    bury: Script
    join: Script


def load_library() -> Library:
    """Read all of them, with the shared pieces that each uses."""
    told = ("clock", "news", "parts")
    return Library(
        load_script("reserve"),
        load_script("release", "clock", "parts"),
        load_script("publish", *told),
        load_script("announce", *told),
        load_script("add", *told),
        load_script("remove", "clock", "news"),
        load_script("move", *told),
        load_script("view", *told),
        load_script("note", *told),
        load_script("beat", *told),
        load_script("bury", *told, "removal"),
        load_script("join", *told, "removal"),
    )
