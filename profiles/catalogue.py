"""Finding profiles: the ones in this package by name, others by path."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from profiles.format import Profile, ProfileError, parse

_SUFFIX = ".json"


def shipped() -> tuple[str, ...]:
    """The names of the profiles in this package, sorted."""
    folder = resources.files("profiles") / "shipped"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def load(name_or_path: str | Path) -> Profile:
    """Load a shipped profile by its name, or a file by its path (which has a slash or ends in .json).

    Raises:
        ProfileError: no such profile (the nearest name is told), an unreadable file, or what `parse` refuses.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(_SUFFIX):
        try:
            return parse(Path(name_or_path).read_bytes(), text)
        except OSError as error:
            raise ProfileError(f"{text}: {error.strerror or error}") from error
    names = shipped()
    if text not in names:
        nearest = difflib.get_close_matches(text, names, n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ProfileError(f"no profile is named {text!r}{hint} (`tiergate profile list` shows them all)")
    return parse((resources.files("profiles") / "shipped" / (text + _SUFFIX)).read_bytes(), text)
