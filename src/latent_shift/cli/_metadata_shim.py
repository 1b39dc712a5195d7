"""TO DELETE when video.py has `write(..., metadata=)` and `read_metadata`: JSON behind the end of the file."""

import json
from pathlib import Path

from latent_shift import video

_MARK = b"\nlatent-shift metadata\n"


def write(frames, path, *, fps: float = 8, metadata: dict[str, str] | None = None) -> Path:
    path = video.write(frames, path, fps=fps)
    if metadata:
        with path.open("ab") as file:
            file.write(_MARK + json.dumps(metadata).encode())
    return path


def read_metadata(path) -> dict[str, str]:
    _, mark, text = Path(path).read_bytes().rpartition(_MARK)
    return json.loads(text) if mark else {}
