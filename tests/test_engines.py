"""Engines beside PyTorch: the same noise, the same samplers, the same clips."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler
from test_shift import tiny_unet

from latent_shift import video
from latent_shift.diffusion import noise_schedule
from latent_shift.engines import exported
from latent_shift.engines.steps import sampler_steps, timesteps_of
from latent_shift.models.names import embedder
from latent_shift.noise import clip_noise, standard_normal
from latent_shift.pipelines import catalog
from latent_shift.pipelines.loading import load
from latent_shift.pipelines.noise import draw_noise
from latent_shift.pipelines.request import Request, generate_clip
from latent_shift.runtime import seed
from latent_shift.shift import Shift, inflate


@pytest.mark.parametrize("number", [0, 7, -1, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize("shape", [(16,), (4, 5, 7), (2, 4, 16, 16), (17,)])
def test_noise_is_that_of_torch(number, shape):
    expected = torch.randn(shape, generator=seed(number)).numpy()
    np.testing.assert_allclose(standard_normal(number, shape), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("num_frames", "options"),
    [(1, {}), (5, {}), (5, {"noise_correlation": 0.7}), (5, {"shared_noise": 0.4, "noise_correlation": 0.5, "loop": True})],
)  # fmt: skip
def test_noise_of_clips_is_that_of_the_pipeline(num_frames, options):
    expected = draw_noise((1, 4, num_frames, 6, 8), generator=seed(3), device=torch.device("cpu"), **options)
    np.testing.assert_allclose(
        clip_noise(3, (4, num_frames, 6, 8), **options), expected[0], rtol=0, atol=3e-6
    )


@pytest.mark.parametrize("num", [1, 2, 4, 7, 20, 30, 48])
@pytest.mark.parametrize("name", ["ddim", "dpm-solver++"])
@pytest.mark.parametrize(
    ("prediction", "spacing"),
    [("epsilon", "leading"), ("epsilon", "linspace"), ("epsilon", "trailing"), ("v_prediction", "trailing")],
)
def test_samplers_are_those_of_diffusers(name, prediction, spacing, num):
    """On a network that is linear in its input and changes with the timestep."""
    schedule = noise_schedule(prediction=prediction, zero_terminal_snr=prediction == "v_prediction")
    kind = DDIMScheduler if name == "ddim" else DPMSolverMultistepScheduler
    scheduler = kind.from_config(schedule.config, timestep_spacing=spacing)
    scheduler.set_timesteps(num)
    timesteps = timesteps_of(
        name, num, num_timesteps=1000, spacing=scheduler.config.timestep_spacing, offset=scheduler.config.steps_offset
    )  # fmt: skip
    assert timesteps == scheduler.timesteps.tolist()
    last_alpha = (
        float(scheduler.alphas_cumprod[0])
        if name == "ddim" and not scheduler.config.set_alpha_to_one
        else 1.0
    )
    steps = sampler_steps(
        name, timesteps, scheduler.alphas_cumprod.tolist(), prediction=prediction, last_alpha=last_alpha
    )
    expected = torch.randn(2, 4, generator=seed(0), dtype=torch.float64)
    sample, before = expected.numpy().copy(), 0.0
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        expected = scheduler.step(0.3 * expected + timestep / 3000, timestep, expected, return_dict=False)[0]
        clean = step.clean_sample * sample + step.clean_output * (0.3 * sample + step.timestep / 3000)
        sample, before = step.sample * sample + step.clean * clean + step.clean_before * before, clean
    np.testing.assert_allclose(sample, expected, rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module", params=["one level", pytest.param("tiny", marks=pytest.mark.slow)])
def model(request, video_model, shared):
    """A model folder. The exporter takes seconds for every block, however narrow: "one level" has every layer but the changes of
    resolution of the U-Net, and an autoencoder of 2x instead of 8x."""
    if request.param == "tiny":
        return video_model
    pipe = load(video_model, device="cpu", dtype=torch.float32)
    unet = tiny_unet(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), mid_block_type=None, up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=pipe.unet.config.cross_attention_dim, sample_size=16,
    )  # fmt: skip
    pipe.unet = inflate(unet, Shift(edge="hold"))
    pipe.vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4, mid_block_add_attention=False,
    )  # fmt: skip
    return shared("one-level", pipe.save_pretrained)


@pytest.fixture(scope="module")
def folder(model, shared):
    """The exported model."""
    pytest.importorskip("onnxruntime")
    from latent_shift.engines.export import export

    return shared(f"exported-{model.name}", lambda folder: export(str(model), folder))


REQUESTS = {
    "plain": {},
    "guided": {"guidance_scale": 3.0, "negative_prompt": "blue"},
    "loop": {"loop": True, "num_frames": 6, "noise_correlation": 0.5},
    "image": {"num_frames": 1},
    "long": {"num_frames": 70, "num_inference_steps": 1},
    "wide": {"width": 64, "num_frames": 2, "num_inference_steps": 5},
}


@pytest.mark.parametrize("engine", exported.ENGINES)
def test_clips_are_those_of_the_pipeline(engine, folder, model):
    """Same seed, same clip, to a level of a pixel: every engine in float32."""
    pytest.importorskip({"onnx": "onnxruntime"}.get(engine, engine))
    pipe = load(model, device="cpu", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    other = exported.ExportedPipeline(folder, engine)
    for name, fields in REQUESTS.items():
        request, steps = Request(prompt="a red square", seed=5, **fields), []
        clip = other.generate(request, on_step=lambda done, total: steps.append((done, total)))  # noqa: B023
        expected = generate_clip(request, pipe)
        assert clip.frames.shape == expected.frames.shape, name
        difference = np.abs(clip.frames.astype(int) - expected.frames)
        tolerance = 1 if other.engine.describe()["precision"] == "float32" else 24
        assert difference.max() <= tolerance, (name, difference.max())
        assert clip.fps == expected.fps
        assert steps[-1][0] == steps[-1][1] == len(steps)
        assert {
            key: clip.settings[key] for key in ("num_frames", "seed", "num_inference_steps", "guidance_scale")
        } == {
            key: expected.settings[key]
            for key in ("num_frames", "seed", "num_inference_steps", "guidance_scale")
        }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"then": {2: "a blue square"}}, "then needs --engine torch"),
        ({"scheduler": "DDIM"}, "scheduler needs --engine torch"),
        ({"width": 33}, "width=33: an exported model takes multiples of"),
        ({"prompt": "a (red:1.4) square"}, "weights such as"),
        ({"guidance_scale": 1.0, "negative_prompt": "blue"}, "negative_prompt has no effect"),
        ({"num_inference_steps": 2000}, "must be at most 1000"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(folder, fields, words):
    pipeline = exported.ExportedPipeline(folder)
    with pytest.raises(ValueError, match=words):
        pipeline.generate(Request(**{"prompt": "a red square", **fields}))


def test_a_flow_is_not_exported(video_model, tmp_path):
    pytest.importorskip("onnxruntime")
    from latent_shift.engines.export import export

    pipe = load(video_model, device="cpu")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **flow)
    pipe.save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="predicts flow_prediction: the engines sample models that predict"):
        export(str(tmp_path / "flow"), tmp_path / "exported")


@pytest.mark.parametrize("option", ["use_karras_sigmas", "solver_order", "algorithm_type"])
def test_a_scheduler_that_engines_do_not_have_is_not_exported(option, video_model, tmp_path):
    pytest.importorskip("onnxruntime")
    from latent_shift.engines.export import export

    pipe = load(video_model, device="cpu")
    value = {"use_karras_sigmas": True, "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}[option]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **{option: value})
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=re.escape(f"its scheduler has {option}={value!r}, which the engines do not sample")
    ):
        export(str(tmp_path / "model"), tmp_path / "exported")


def test_nothing_of_another_model_stays_in_an_export(video_model, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from latent_shift.engines import export

    for name in (exported.SETTINGS, "names.safetensors", "preview.safetensors", ".openvino/compiled"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(export, "_write", lambda *_: None)
    export.export(str(video_model), tmp_path)
    assert not (tmp_path / "names.safetensors").exists()
    assert not any(path.read_bytes() == b"old" for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(ValueError, match="has no tiny_vae, so --large-decoder has no effect"):
        export.export(str(video_model), tmp_path, large_decoder=True)


def test_words_that_an_engine_does_not_read_are_named(folder, caplog):
    pipeline = exported.ExportedPipeline(folder)
    pipeline.embed("a red square")
    assert not caplog.records
    pipeline.embed("red " * pipeline.settings.max_tokens + "blue")
    assert "prompt is truncated to the" in caplog.text and "blue" in caplog.text.rpartition(": ")[2]


def test_a_page_offers_steps_that_the_model_has(folder):
    from latent_shift.engines import web

    settings = exported.read_settings(folder)
    few = settings.model_copy(update={"alphas_cumprod": settings.alphas_cumprod[::25]})
    assert max(map(int, web._tables(few))) <= len(few.alphas_cumprod) < max(map(int, web._tables(settings)))
    assert list(web._tables(settings.model_copy(update={"distilled_steps": 6}))) == ["1", "2", "3", "6"]


def test_sentence_embeddings_are_those_of_the_names(folder, model):
    pipe = load(model, device="cpu", dtype=torch.float32)
    texts = ["a red square", "blue", "a long and winding road of words and words"]
    expected = embedder(pipe.tokenizer, pipe.text_encoder)(texts)
    np.testing.assert_allclose(
        exported.ExportedPipeline(folder).sentence_embeddings(texts), expected, atol=2e-3
    )


def test_torch_is_not_imported(folder):
    """What makes the first clip fast: neither torch nor diffusers, nor transformers."""
    code = f"""
import sys
from latent_shift.engines.exported import ExportedPipeline
from latent_shift.pipelines.request import Request
ExportedPipeline({str(folder)!r}).generate(Request(prompt="a red square"))
print(sorted({{"torch", "diffusers", "transformers", "scipy", "pandas"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"


def test_other_folders_are_refused(video_model, tmp_path):
    with pytest.raises(
        ValueError, match=r"has no exported.json; expected a folder of `latent-shift export FOLDER"
    ):
        exported.ExportedPipeline(video_model)
    with pytest.raises(ValueError, match="unknown engine 'tensorrt'; expected one of onnx, openvino"):
        exported.ExportedPipeline(tmp_path, "tensorrt")


def run_command(*words):
    """Return the exit status and standard error of `latent-shift`."""
    result = subprocess.run(
        [sys.executable, "-m", "latent_shift", *map(str, words)], capture_output=True, text=True
    )
    return result.returncode, result.stderr


def test_command(folder, tmp_path):
    path = tmp_path / "clip.mp4"
    status, errors = run_command("generate", "a red square", "-m", folder, "--engine", "onnx", "-o", path)
    assert (status, "on the CPU by onnx in float32" in errors) == (0, True), errors
    metadata = video.read_metadata(path)
    assert metadata["engine"] == "onnx"
    assert "onnxruntime: " in metadata["versions"]
    assert "--engine onnx" in metadata["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "is exported; expected --engine onnx or --engine openvino"),
        (("--engine", "onnx", "--device", "cpu"), "--device needs --engine torch"),
        (("--engine", "onnx", "--chunk", "4"), "chunk needs --engine torch"),
        (("--engine", "onnx", "--model", "emoji"), "has no exported.json"),
    ],
)
def test_command_names_what_does_not_fit(folder, words, message, tmp_path):
    status, errors = run_command("generate", "a", "-m", folder, "-o", tmp_path / "a.mp4", *words)
    assert (status, message in errors) == (1, True), errors


def test_export_command_names_options_without_effect(tmp_path):
    status, errors = run_command("export", tmp_path / "a", "--packages", tmp_path)
    assert (status, "--packages has no effect without --web" in errors) == (1, True), errors


def test_export_command_refuses_an_exported_model(folder, tmp_path):
    status, errors = run_command("export", tmp_path / "again", "--model", folder)
    assert (status, "is exported already; expected the model" in errors) == (1, True), errors


def test_export_command_keeps_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    status, errors = run_command("export", tmp_path)
    assert (status, "notes.txt" in errors or "holds" in errors) == (1, True), errors
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_server_generates_with_an_exported_model(folder, tmp_path):
    pytest.importorskip("starlette")
    from serving import running

    from latent_shift.serve.server import local_workers

    (worker,) = local_workers(1, {str(folder): str(folder)}, threads=1, engine="onnx")
    with running(tmp_path, [str(folder)], workers=[worker]) as client:
        request = {"prompt": "a red square", "seed": 5, "num_frames": 3, "guidance_scale": 3}
        answer = client.post("/v1/videos/sync", json=request)
        assert answer.status_code == 200, answer.text
        (tmp_path / "clip.mp4").write_bytes(answer.content)
        assert video.read_metadata(tmp_path / "clip.mp4")["engine"] == "onnx"
        (newest,) = client.get("/v1/videos?limit=1").json()["data"]
        (tmp_path / "clip.png").write_bytes(
            client.get(f"/v1/videos/{newest['id']}/content?format=png").content
        )
        frames = np.stack(np.split(video.read(tmp_path / "clip.png")[0][0], 3, axis=1))
        expected = exported.ExportedPipeline(folder).generate(Request(**request)).frames
        assert np.abs(frames.astype(int) - expected).max() <= 1
        refused = client.post("/v1/videos/sync", json={**request, "then": {"1": "blue"}})
        assert "then needs --engine torch" in refused.text


@pytest.mark.parametrize(
    ("engine", "models", "device", "words"),
    [
        ("tensorrt", {}, None, "--engine tensorrt: expected one of torch, onnx, openvino"),
        ("onnx", {"emoji": "emoji"}, None, "emoji: has no exported.json"),
        ("onnx", {}, "cpu", "--device needs --engine torch"),
        ("torch", {"a": ...}, None, "is exported; expected --engine onnx"),
    ],
)
def test_server_refuses_engines_that_do_not_fit(engine, models, device, words, folder):
    pytest.importorskip("starlette")
    from latent_shift.serve.server import check_engine

    named = {name: str(folder) if model is ... else model for name, model in models.items()}
    with pytest.raises(ValueError, match=words):
        check_engine(engine, named, device)


def test_a_name_is_no_folder(tmp_path, monkeypatch):
    """A folder that is called like an embedded model does not take its place, in any command."""
    for name in ("emoji", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / exported.SETTINGS).write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert [exported.is_exported(name) for name in ("emoji", "./emoji", "mine")] == [False, True, True]
    shutil.rmtree("emoji")
    Path("emoji").write_text("a file")
    catalog.check_model("emoji")
    assert [catalog.on_hub(name) for name in ("owner/name", "./name", "../name")] == [True, False, False]


def test_bench_engines(video_model):
    pytest.importorskip("onnxruntime")
    from latent_shift.benchmark import engines

    result = engines._warm("torch", str(video_model), 1, (2, 1), 1.0)
    assert {"clips", "unet", "peak_gib", "precision", "version"} == set(result)
    assert list(result["clips"]) == ["2", "1"]
    assert result["clips"]["2"] > result["unet"] > 0
    assert isinstance(engines.instruction_sets(), list)
