"""Names of classes as people write them: which are one, which only look so, and their order."""

from __future__ import annotations

from collections.abc import Mapping

from ldam_plugins.data.notes import DataNotes


def same_but_blanks(counts: Mapping[str, int], notes: DataNotes) -> dict[str, str]:
    """The class that each spelling stands for: those that differ in outer blanks only are one.

    ``"x "`` beside ``"x"`` is ``"x"``; alone it stays as it is. What is merged is noted, and so are
    names that differ in capitals or inner blanks only, which stay apart: ``Cat`` and ``cat`` may be
    two things.

    Args:
        counts: Examples by spelling.
        notes: Where to note it.
    """
    spellings: dict[str, list[str]] = {}
    for name in counts:
        spellings.setdefault(name.strip() or name, []).append(name)
    classes = {}
    for plain, names in spellings.items():
        for name in names:
            classes[name] = plain if len(names) > 1 else name
        if len(names) > 1:
            shown = ", ".join(f"{name!r} ({counts[name]})" for name in names)
            notes.say(f"Read as one class, {plain!r}, since they differ in blanks only: {shown}.")
    _note_alike({name: counts.get(name, 0) for name in classes.values()}, notes)
    return {name: classes[name] for name in counts}


def _note_alike(counts: Mapping[str, int], notes: DataNotes) -> None:
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault("".join(name.casefold().split()), []).append(name)
    pairs = [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    if pairs:
        shown = f"{', '.join(pairs[:20])}{', ...' if len(pairs) > 20 else ''}"
        notes.say(f"Kept apart, though they look like one class: {shown}.")
