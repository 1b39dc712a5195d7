"""The examples of docs/serving.md, run against a server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import listening, png

PAGE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()


def example(title, base):
    """Return the code below a heading, for this server and the tiny model."""
    code = re.search(rf"### {title}\n.*?```\w+\n(.*?)```", PAGE, re.DOTALL)[1]
    for old, new in (("http://127.0.0.1:8000/", base), ("128x128", "32x32")):
        code = code.replace(old, new)
    return code


@pytest.fixture(scope="module")
def server(video_model, tmp_path_factory):
    with listening(tmp_path_factory.mktemp("data"), [video_model]) as client:
        yield client


@pytest.mark.skipif(not all(map(shutil.which, ("curl", "jq"))), reason="no curl or jq")
def test_curl(server, tmp_path):
    (tmp_path / "first-frame.png").write_bytes(png())
    subprocess.run(["bash", "-ec", example("curl", server.url)], cwd=tmp_path, check=True)
    assert "event: completed" in (tmp_path / "events.txt").read_text()
    for name in ("rocket.mp4", "from-a-picture.mp4"):
        assert (tmp_path / name).read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("title", "name", "start"),
    [("Python", "rocket.gif", b"GIF8"), ("OpenAI client", "rocket.mp4", b"\0\0\0 ftyp")],
)
def test_python(server, tmp_path, title, name, start):
    if title == "OpenAI client":
        pytest.importorskip("openai")
    subprocess.run([sys.executable, "-c", example(title, server.url)], cwd=tmp_path, check=True)
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js")
def test_javascript(server, tmp_path):
    code = (
        example("JavaScript", server.url)
        + "\nconsole.log(video.status, new TextDecoder().decode(clip.slice(0, 6)));\n"
    )
    (tmp_path / "example.mjs").write_text(code)
    result = subprocess.run(["node", "example.mjs"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert result.stdout == "completed GIF89a\n"


def test_every_route_is_in_the_table(server):
    paths = server.get("/openapi.json").json()["paths"]
    missing = [
        path for path in paths if path.replace("{video_id}", "{id}").replace("{model_id}", "{id}") not in PAGE
    ]
    assert missing == []
