"""Listing the files of a kind in a user's folder, with counts of the others.

Links are followed, to folders too, each folder and file once: data sets are often assembled from links. Hidden files
are not data: macOS writes ``._NAME`` beside each file of a foreign disk, with the same suffix.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from speechlm_ext.errors import SpeechLMError

#: Folders that systems leave in archives and on foreign disks.
_HIDDEN_FOLDERS = ("__MACOSX",)


@dataclass
class FoundFiles:
    """Result of :func:`find_files`."""

    files: list[Path] = field(default_factory=list)
    """Paths that start with the given folder, sorted by their parts."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of files and folders that were left out, by reason."""

    def __str__(self) -> str:
        """The reasons in words; empty if nothing was left out."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))


def find_files(
    folder: Path, suffixes: Collection[str], error: type[SpeechLMError], *, recursive: bool = True
) -> FoundFiles:
    """Find the files with given suffixes, in lower case with their dot, in a folder and its sub-folders.

    A file with several names below the folder, by links, counts once: by its own name, else by the first. Without
    ``recursive`` sub-folders are counted as left out, and other files are not.

    Raises ``error``: a folder that cannot be read, or a name that is not Unicode.
    """
    found = FoundFiles()
    real: dict[str, Path] = {}
    top = os.path.realpath(folder)
    seen = {top}
    todo, links = [(folder, top)], list[tuple[Path, str]]()
    while todo or links:
        # Folders by their own names first, so that a link back to one of them is left out, not the folder.
        todo.sort(reverse=True)
        links.sort(reverse=True)
        here, target = todo.pop() if todo else links.pop()
        if here != folder:
            if target in seen:
                found.left_out["links to folders that were read already"] += 1
                continue
            seen.add(target)
        for entry in _entries(here, error):
            path = here / entry.name
            is_wanted = path.suffix.lower() in suffixes
            is_folder = os.path.isdir(path)
            own = os.path.realpath(path) if entry.is_symlink() else os.path.join(target, entry.name)
            if entry.name.startswith(".") or entry.name in _HIDDEN_FOLDERS:
                if is_wanted or is_folder:
                    found.left_out[f"hidden {'folders' if is_folder else 'files'}"] += 1
            elif is_folder and not recursive:
                found.left_out["sub-folders"] += 1
            elif is_folder:
                (links if entry.is_symlink() else todo).append((path, own))
            elif not os.path.exists(path):
                found.left_out["links to nothing"] += 1
            elif not is_wanted:
                if recursive:
                    found.left_out[
                        f"files *{path.suffix.lower()}" if path.suffix else "files without ending"
                    ] += 1
            elif not os.path.isfile(path):
                found.left_out["devices or pipes"] += 1
            else:
                _take(path, own, real, found)
    found.files = sorted(real.values())
    return found


def _entries(folder: Path, error: type[SpeechLMError]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as problem:
        raise error(
            f"folder {folder} cannot be read ({problem.strerror or problem}); check its rights, or leave it out."
        ) from None
    for entry in entries:
        try:
            entry.name.encode("utf-8")
        except UnicodeEncodeError:
            raise error(
                f"folder {folder} has a name that is not UTF-8: {os.fsencode(entry.name)!r}; rename it."
            ) from None
    return entries


def _take(path: Path, target: str, real: dict[str, Path], found: FoundFiles) -> None:
    """Keep a file unless another name of it is kept; its own name goes before that of a link."""
    other = real.get(target)
    if other is not None:
        found.left_out["links to files that were found already"] += 1
        if not other.is_symlink() or path.is_symlink():
            return
    real[target] = path
