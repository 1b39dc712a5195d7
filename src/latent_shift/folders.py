"""Output folders: a command writes only into a folder that is its own, and alone.

A folder is a command's own if it is new or empty, or holds the marker that the same kind of command left there.
Everything else is somebody's: it is refused, unless the person says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from latent_shift.files import read_json, write_json

MARKER = ".latent-shift.json"
LOCK = ".lock"
_DEBRIS = re.compile(
    r"\._.*|__MACOSX|\.DS_Store|\.Spotlight-V100|\.Trashes|\.fseventsd|\.AppleDouble"  # macOS
    r"|Thumbs\.db|ehthumbs\.db|desktop\.ini|\$RECYCLE\.BIN|System Volume Information"  # Windows
    r"|@eaDir|lost\+found|\.directory|\.Trash-\d+|\.nfs[0-9a-f]+"  # network drives, Linux
    r"|\.git|\.gitattributes|\.gitignore|\.cache|\.ipynb_checkpoints"
    r"|\.lock|\.latent-shift\.json|\..*\.partial",
    re.IGNORECASE,
)


class FolderInUse(ValueError):
    """Another process writes into a folder."""


@contextmanager
def output_folder(
    folder: str | Path,
    kind: str,
    *,
    force: bool = False,
    is_own: Callable[[Path], bool] | None = None,
    wait: bool = False,
) -> Iterator[Path]:
    """Create a folder for the output of one command, mark it as such, and lock it inside the `with` block.

    The lock is the operating system's, so it is released however the process ends.

    Args:
        folder: where the output goes; missing parents are created.
        kind: what the folder holds, in words that fit into "holds ...", such as "a data set of pixels".
        force: also take a folder that is not the command's own. Its files are kept, but those with names that
            the command writes are replaced.
        is_own: recognises a folder from before folders were marked.
        wait: wait until another process that is at work there has ended.

    Raises:
        ValueError: a file instead of a folder, a folder that is not the command's own, or (`FolderInUse`) one
            in which another process is at work.
    """
    folder = Path(folder)
    try:
        check_own(folder, kind, force=force, is_own=is_own)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK).acquire(timeout=-1 if wait else 0)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder}: expected a folder, but a file is in its way") from error
    except Timeout:
        raise FolderInUse(f"{folder}: another process is writing there; choose another folder") from None
    with lock:
        # Another process may have filled the folder since it was checked.
        check_own(folder, kind, force=force, is_own=is_own)
        if read_kind(folder) != kind:
            write_json({"kind": kind}, folder / MARKER)
        yield folder


def check_own(
    folder: Path, kind: str, *, force: bool = False, is_own: Callable[[Path], bool] | None = None
) -> None:
    """Raise ValueError if a folder holds anything but what a command of this kind wrote; see `output_folder`."""
    if force or not folder.exists():
        return
    found = read_kind(folder)
    if found == kind or (found is None and is_own is not None and is_own(folder)):
        return
    if found is not None:
        raise ValueError(
            f"{folder}: holds {found}, expected {kind} or an empty folder; choose another, or use --force"
        )
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not is_debris(name) or name == MARKER]  # a damaged marker is foreign
    if foreign:
        raise ValueError(
            f"{folder}: holds {foreign[0]}, which latent-shift did not write there; choose an empty folder, or use --force"
        )


def read_kind(folder: Path) -> str | None:
    """Return what a folder is marked to hold, or None if it is not marked."""
    try:
        marker = read_json(folder / MARKER)
    except (OSError, ValueError):
        return None
    kind = marker.get("kind") if isinstance(marker, dict) else None
    return kind if isinstance(kind, str) else None


def is_debris(name: str) -> bool:
    """Return whether a file or folder was left by the operating system or a program, and holds no data."""
    return _DEBRIS.fullmatch(name) is not None
