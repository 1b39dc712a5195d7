"""A model in a page, driven in Chromium: it samples what ONNX Runtime samples, offline too, and gives files."""

import contextlib
import functools
import gzip
import http.server
import json
import shutil
import subprocess
import threading
from dataclasses import replace

import numpy as np
import pytest
from serving import listening
from test_browser import CHROMIUM, FLAGS, browser  # noqa: F401
from test_engines import folder, model  # noqa: F401

from latent_shift import video
from latent_shift.engines import web
from latent_shift.engines.exported import ExportedPipeline, neighbor_indices
from latent_shift.noise import clip_noise
from latent_shift.pipelines.request import Request
from latent_shift.serve.service import Settings

pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def packages(shared):
    """The archives of the npm packages."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")

    def get(out):
        names = [f"{package.name}@{package.version}" for package in web.PACKAGES]
        result = subprocess.run(
            [npm, "pack", "--prefer-offline", *names],
            cwd=out,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=120,
        )
        if result.returncode:
            pytest.skip(f"npm finds no packages: {result.stderr[-200:]}")

    return shared("packages", get)


@pytest.fixture(scope="module")
def site(folder, packages, shared):  # noqa: F811
    """The folder of the page."""
    return shared(f"web-{folder.name}", lambda out: web.export_web(str(folder), out, packages))


class Server:
    """Serves a folder as any static host does."""

    def __init__(self, site):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        handler = functools.partial(Handler, directory=site)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def page(site, browser):  # noqa: F811
    server = Server(site)
    page = browser.new_page(accept_downloads=True)
    page.problems, page.server = [], server
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(server.address)
    page.wait_for_selector("body[data-ready=true]", timeout=60_000)
    yield page
    server.stop()


def generate(page, prompt, **fields):
    for name, value in {"prompt": prompt, "seed": 3, "frames": 4, **fields}.items():
        page.fill(f"#{name}", str(value))
    page.set_checked("#keep", True)
    page.evaluate("delete document.body.dataset.state")
    page.click("#go")
    page.wait_for_selector("body:is([data-state=done], [data-state=failed]) #go:enabled", timeout=60_000)
    return page.inner_text("#problem") if page.is_visible("#problem") else ""


def call(page, function, *arguments):
    """Return what a function of sampling.js returns."""
    return page.evaluate(
        "async ([name, list]) => JSON.parse(JSON.stringify((await import('./sampling.js'))[name](...list),"
        " (key, value) => ArrayBuffer.isView(value) ? Array.from(value, Number) : value))",
        [function, list(arguments)],
    )


@pytest.mark.parametrize(
    ("num_frames", "options"),
    [(1, {}), (5, {}), (5, {"noise_correlation": 0.7}), (5, {"shared_noise": 0.4, "noise_correlation": 0.5, "loop": True})],
)  # fmt: skip
@pytest.mark.parametrize("number", [0, 2**32 - 1])
def test_noise_is_that_of_a_seed(page, number, num_frames, options):
    names = {"shared_noise": "shared", "noise_correlation": "correlation", "loop": "loop"}
    noise = call(
        page,
        "clipNoise",
        number,
        num_frames,
        4 * 6 * 7,
        {names[name]: value for name, value in options.items()},
    )
    expected = clip_noise(number, (4, num_frames, 6, 7), **options).swapaxes(0, 1)
    np.testing.assert_allclose(np.reshape(noise, expected.shape), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("edge", ["zero", "hold", "wrap"])
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_neighbors_are_those_of_an_exported_model(page, num_frames, edge):
    expected = {name: array.tolist() for name, array in neighbor_indices(num_frames, edge).items()}
    assert call(page, "neighbors", num_frames, edge) == expected


def test_tokens_are_cut_before_the_last(page):
    assert call(page, "fitTokens", [1, 5, 6, 7, 2], 4, 0) == {
        "input_ids": [1, 5, 6, 2],
        "attention_mask": [1, 1, 1, 1],
    }
    assert call(page, "fitTokens", [1, 5, 2], 5, 9) == {
        "input_ids": [1, 5, 2, 9, 9],
        "attention_mask": [1, 1, 1, 0, 0],
    }


@pytest.fixture(scope="module")
def unpacked(site, tmp_path_factory):
    """The page's own model, for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("unpacked")  # noqa: F811
    for path in (site / "model").glob("*.gz"):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return ExportedPipeline(folder)


@pytest.mark.parametrize("options", [{}, {"loop": True}, {"num_frames": 1}])
def test_clip_is_that_of_onnx_runtime(page, unpacked, options):
    page.set_checked("#loop", bool(options.get("loop")))
    assert generate(page, "a red \\(square\\)", frames=options.get("num_frames", 4), guidance=3) == ""
    page.set_checked("#loop", False)
    steps = int(page.input_value("#steps"))
    expected = unpacked.generate(
        Request(
            prompt="a red \\(square\\)", seed=3, guidance_scale=3, num_inference_steps=steps, **{"num_frames": 4, **options}
        )
    )  # fmt: skip
    frames = page.evaluate("Array.from(document.getElementById('clip').frames())")
    assert np.abs(np.reshape(frames, expected.frames.shape).astype(int) - expected.frames).max() <= 1


@pytest.mark.parametrize("extension", ["gif", "mp4"])
def test_downloads_are_files_that_play(page, extension, tmp_path):
    assert generate(page, "A red: square") == ""
    with page.expect_download() as download:
        page.click(f"#downloads button[data-format={extension}]")
    assert download.value.suggested_filename == f"a-red-square-3.{extension}"
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    frames, fps = video.read(path)
    assert (len(frames), fps) == (4, 8)
    side = page.evaluate("document.getElementById('clip').width") * (2 if extension == "mp4" else 1)
    assert frames.shape[1:3] == (side, side)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": " "}, "prompt: expected words"),
        ({"prompt": "a (red:1.4) square"}, "weights in brackets"),
        ({"seed": "four"}, 'seed: expected a whole number from 0 to 4294967295, got "four"'),
        ({"frames": 65}, 'frames: expected a whole number from 1 to 64, got "65"'),
        ({"guidance": 0}, 'guidance: expected a number from 1 to 30, got "0"'),
    ],
)
def test_mistakes_are_told(page, fields, words):
    assert words in generate(page, **{"prompt": "a red square", "guidance": 2, **fields})


def test_cancel_and_again(page):
    page.fill("#frames", "64")
    page.select_option("#steps", "50")
    page.fill("#guidance", "2")
    page.fill("#prompt", "a red square")
    page.fill("#seed", "1")
    page.click("#go")
    page.click("#cancel")
    page.wait_for_function("!document.getElementById('go').disabled")
    assert page.inner_text("#problem") == "Cancelled."
    page.select_option("#steps", "2")
    assert generate(page, "a red square") == ""


def test_another_export_is_seen_at_the_next_visit(site, browser, tmp_path):  # noqa: F811
    copy = tmp_path / "copy"
    shutil.copytree(site, copy)
    server = Server(copy)
    page = browser.new_page()
    page.goto(server.address)
    page.wait_for_selector("body[data-ready=true]", timeout=60_000)
    packed, manifest = copy / "model" / "exported.json.gz", copy / "web.json"
    settings = json.loads(gzip.decompress(packed.read_bytes())) | {"num_frames": 3}
    packed.write_bytes(gzip.compress(json.dumps(settings).encode()))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": "another"}))
    page.reload()
    page.wait_for_selector("body[data-ready=true]", timeout=60_000)
    assert page.input_value("#frames") == "3"
    page.close()
    server.stop()


def test_page_works_offline_after_one_visit(site, browser):  # noqa: F811
    server = Server(site)
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.goto(server.address)
    page.wait_for_selector("body[data-ready=true]", timeout=60_000)
    assert [
        line for line in page.problems if "No available adapters" not in line
    ] == []  # a Chromium without WebGPU
    assert page.evaluate("crossOriginIsolated")
    assert "thread" in page.inner_text("#engine")
    server.stop()
    page.reload()
    page.wait_for_selector("body[data-ready=true]", timeout=60_000)
    assert page.evaluate("crossOriginIsolated")
    assert generate(page, "a red square") == ""
    with page.expect_download() as download:
        page.click("#downloads button[data-format=gif]")
    assert len(video.read(download.value.path())[0]) == 4
    context.close()


def test_a_seed_that_is_given_is_kept(site, browser):  # noqa: F811
    server = Server(site)
    page = browser.new_page()
    page.goto(f"{server.address}?prompt=a red square&seed=7")
    page.wait_for_selector("body[data-ready=true]", timeout=60_000)
    seeds = []
    for number in (None, "12", ""):
        if number is not None:
            page.fill("#seed", number)
        page.evaluate("delete document.body.dataset.state")
        page.click("#go")
        page.wait_for_selector("body[data-state=done] #go:enabled", timeout=60_000)
        seeds.append(page.input_value("#seed"))
    assert seeds[:2] == ["7", "12"] and seeds[2] not in ("", "7", "12")
    page.close()
    server.stop()


@pytest.mark.slow
def test_exporting_again_replaces_the_page(folder, site, packages, tmp_path):  # noqa: F811
    first = web.export_web(str(folder), tmp_path / "page", packages)
    before = {path.relative_to(first): path.read_bytes() for path in first.rglob("*") if path.is_file()}
    again = web.export_web(str(folder), tmp_path / "page", packages)
    assert before == {
        path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()
    }
    names = {path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file()}
    assert names == {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    settings = json.loads(gzip.decompress((first / "model" / "exported.json.gz").read_bytes()))
    assert "/" not in settings["model"]
    with pytest.raises(ValueError, match="--large-decoder has no effect"):
        web.export_web(str(folder), tmp_path / "other", packages, large_decoder=True)


def test_server_serves_the_page_and_links_to_it(site, model, browser, tmp_path):  # noqa: F811
    with listening(tmp_path, [model], settings=Settings(web=site)) as server:
        page = browser.new_page()
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.goto(server.url)
        page.click("text=Generate in this browser instead")
        page.wait_for_selector("body[data-ready=true]", timeout=60_000)
        assert page.evaluate("crossOriginIsolated")
        assert generate(page, "a red square") == ""
        assert [line for line in page.problems if "No available adapters" not in line] == []
    with listening(tmp_path / "other", [model]) as server:
        page.goto(server.url)
        assert not page.is_visible("text=Generate in this browser instead")
        assert server.get("/web/").status_code == 404


# The graphics card of a machine without one is a program: seconds for a network this small.
WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", ["0.02", "-1"])
def test_webgpu_is_used_where_it_computes_what_webassembly_does(site, unpacked, browser, tolerance):  # noqa: F811
    server = Server(site)
    if not CHROMIUM:
        pytest.skip("no Chromium of this machine")
    with contextlib.closing(
        browser.browser_type.launch(executable_path=CHROMIUM, args=[*FLAGS[:1], *WEBGPU])
    ) as started:
        page = started.new_page(service_workers="block")
        code = (site / "worker.js").read_text(encoding="utf-8")
        assert "TOLERANCE = 0.02;" in code
        code = code.replace("TOLERANCE = 0.02;", f"TOLERANCE = {tolerance};")
        page.route("**/worker.js", lambda route: route.fulfill(body=code, content_type="text/javascript"))
        page.goto(server.address)
        page.wait_for_selector("body[data-ready=true]", timeout=120_000)
        engine = page.inner_text("#engine")
        if tolerance == "-1":
            assert engine.startswith("WebAssembly, ")
            assert "WebGPU is not used: unet differs from WebAssembly by " in engine
        else:
            assert engine.startswith("WebGPU. ")
        assert generate(page, "a red square", guidance=3) == ""
        frames = page.evaluate("Array.from(document.getElementById('clip').frames())")
        steps = int(page.input_value("#steps"))
        expected = unpacked.generate(
            Request(prompt="a red square", seed=3, guidance_scale=3, num_inference_steps=steps, num_frames=4)
        )
        difference = np.abs(np.reshape(frames, expected.frames.shape).astype(int) - expected.frames)
        assert difference.max() <= (1 if tolerance == "-1" else 3)
    server.stop()


def test_packages_are_those_that_are_expected(packages, tmp_path, monkeypatch):
    first = web.PACKAGES[0]
    with pytest.raises(ValueError, match=f"has no {first.archive}; `npm pack {first.name}@"):
        web.export_web("emoji", tmp_path / "page", tmp_path)
    monkeypatch.setattr(web, "PACKAGES", [replace(first, integrity=web.PACKAGES[1].integrity)])
    with pytest.raises(ValueError, match=r"is not onnxruntime-web .*, its sha512 differs"):
        web.export_web("emoji", tmp_path / "page", packages)
    monkeypatch.setattr(web.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="npm is not installed"):
        web.export_web("emoji", tmp_path / "page")


def test_manifest_names_every_file_it_loads(site):
    manifest = json.loads((site / "web.json").read_text(encoding="utf-8"))
    assert all((site / name).stat().st_size == size for name, size in manifest["files"].items())
    for build in manifest["runtime"].values():
        assert (site / build["module"]).exists() and (site / build["loader"]).exists()
        assert build["binary"] in manifest["files"]
