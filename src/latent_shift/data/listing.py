"""List the files of a folder: linked folders are followed once, special files are named and never opened."""

from __future__ import annotations

import os
import stat
from collections import deque
from pathlib import Path

from latent_shift.data.records import Problem, escape
from latent_shift.files import describe_mode
from latent_shift.folders import is_debris, read_kind


def list_files(folder: Path) -> tuple[list[Path], list[Problem]]:
    """Return the regular files below a folder, sorted, and what else is there.

    Folders that are linked are read after the others, and no folder twice, so that links in a circle end.
    """
    files: list[Path] = []
    problems: list[Problem] = []
    visited: set[tuple[int, int]] = set()
    folders, links = [folder], deque[Path]()
    while folders or links:
        current = folders.pop() if folders else links.popleft()
        name = escape(str(current.relative_to(folder)))
        if current != folder and (kind := read_kind(current)):
            problems.append(Problem(name, f"holds {kind}", "ignored"))
            continue
        try:
            status = current.stat()
            entries = list(os.scandir(current))
        except OSError as error:
            problems.append(Problem(name, f"the folder cannot be read: {error.strerror}"))
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = Path(entry.path)
            if is_debris(entry.name):
                continue
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                reason = "a link to a file that does not exist" if entry.is_symlink() else error.strerror
                problems.append(Problem(escape(str(path.relative_to(folder))), str(reason)))
                continue
            if stat.S_ISDIR(mode):
                (links if entry.is_symlink() else folders).append(path)
            elif stat.S_ISREG(mode):
                files.append(path)
            else:
                reason = f"is {describe_mode(mode)}, expected a file"
                problems.append(Problem(escape(str(path.relative_to(folder))), reason))
    return sorted(files), sorted(problems)
