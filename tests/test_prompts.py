"""Prompts as people write them: weights, brackets that are words, prompts that are cut."""

import logging
import threading

import numpy as np
import pytest
import torch
from test_modes import quiet, sd, xl_components

from latent_shift.models.prompt_syntax import escape_prompt, parse_prompt, plain_prompt
from latent_shift.pipelines.prompts import encode_prompts
from latent_shift.pipelines.request import Request
from latent_shift.pipelines.stable_diffusion import LatentShiftXLPipeline
from latent_shift.runtime import seed, silenced

LONG = "a red ball rolls over a green field"  # the tiny tokenizer reads 18 letters


@pytest.fixture(scope="module")
def pipe(texts):
    return sd(texts)


@pytest.fixture(scope="module")
def xl(texts):
    return quiet(
        LatentShiftXLPipeline(
            **xl_components(texts), latent_shift={"num_frames": 2, "num_inference_steps": 1}
        )
    )


def embeds(pipe, prompt="red", negative_prompt=None, clip_skip=None, **family):
    return encode_prompts(
        pipe, prompt, negative_prompt=negative_prompt, prompt_embeds=None, negative_prompt_embeds=None, num_frames=2, num_videos=1,
        guided=True, height=32, width=32, tensor_inputs=[], clip_skip=clip_skip, cross_attention_kwargs=None, family=family,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("a (red:1.4) ball", [("a ", 1), ("red", 1.4), (" ball", 1)]),
        ("(red:.5) ball", [("red", 0.5), (" ball", 1)]),
        ("(red:1,5)", [("red", 1.5)]),
        ("(red : 2)", [("red ", 2)]),
        ("(red:-1)", [("red", -1)]),
        ("((red:1.2) ball:1.3)", [("red", 1.56), (" ball", 1.3)]),
        ("((big)) [small]", [("big", 1.21), (" ", 1), ("small", 1 / 1.1)]),
        (r"\(red\) (blue\):1.2)", [("(red) ", 1), ("blue)", 1.2)]),
        ("(area 51:1.3)", [("area 51", 1.3)]),
        ("(a clock (12:30):1.3)", [("a clock (12:30)", 1.3)]),
        ("(12:30 on a clock:1.3)", [("12:30 on a clock", 1.3)]),
    ],
)
def test_parse_prompt_reads_weights_as_people_write_them(prompt, segments):
    result = parse_prompt(prompt)
    assert [words for words, _ in result] == [words for words, _ in segments]
    assert [weight for _, weight in result] == pytest.approx([weight for _, weight in segments])


@pytest.mark.parametrize(
    "prompt",
    ["(12:30)", "a clock (12:30:15)", "(John 3:16)", "a (16:9) screen", "(2.39:1)", "(1:1.85)", "[12:30]", ":) and :(", "a) b [c", "()",
     "half (open", "red"],
)  # fmt: skip
def test_parse_prompt_leaves_times_ratios_verses_and_lone_brackets_as_words(prompt):
    assert parse_prompt(prompt) == [(prompt, 1.0)]


@pytest.mark.parametrize("text", ["a (red) [ball]", r"a \(b\)", "(12:30)", "(red:1.5)", ":)"])
def test_escape_prompt_is_read_back_as_the_text(text):
    assert parse_prompt(escape_prompt(text)) == [(text, 1.0)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(heart:" + "9" * 60 + ")", "the weight of 'heart' is 1e\\+60, expected -10 to 10"),
        ("(heart:11)", "the weight of 'heart' is 11, expected -10 to 10"),
        ("((heart:5):3)", "the weight of 'heart' is 15, expected -10 to 10"),
        ("(" * 30 + "heart" + ")" * 30, "the weight of 'heart' is 17.45"),
        ("(" * 200, "nested more than 100 deep"),
        ("(red:1.2.3)", r"expected words and a number, such as \(red:1.3\), got '\(red:1.2.3\)'"),
        ("(red:nan)", "expected words and a number"),
        ("(:1.3)", "expected words and a number"),
        ("[cat:dog:0.5]", "a prompt that changes over time is given as `then`"),
        ("red \ud83d", r"expected text in Unicode, got '\\ud83d' at position 4"),
        ("red <lora:style:0.8>", "'<lora:style:0.8>' would be read as words; load such a file with --lora"),
    ],
)
def test_request_refuses_weights_that_cannot_be_meant(prompt, message):
    for field in (
        {"prompt": prompt},
        {"prompt": "red", "negative_prompt": prompt},
        {"prompt": "red", "then": {1: prompt}},
    ):
        with pytest.raises(ValueError, match=message):
            Request(**field)


@pytest.mark.parametrize("family", ["pipe", "xl"])
def test_weights_scale_the_embedding_from_the_null_prompt(family, request):
    """In prompts and in negative prompts, of one text encoder and of two; other tokens stay."""
    pipe = request.getfixturevalue(family)
    weighted, plain, null = (embeds(pipe, prompt, prompt) for prompt in ("ab (cd:1.5) [ef]", "ab cd ef", " "))
    factors = torch.ones(20)
    factors[3:5], factors[5:7] = 1.5, 1 / 1.1
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        expected = null[name] + factors[:, None] * (plain[name] - null[name])
        torch.testing.assert_close(weighted[name], expected, atol=1e-5, rtol=1e-4)
    if family == "xl":
        assert torch.equal(weighted["add_text_embeds"], plain["add_text_embeds"])


def test_weights_of_xl_fall_on_the_encoder_of_their_prompt(xl):
    plain = embeds(xl, "ab", prompt_2="cd")["prompt_embeds"]
    first = embeds(xl, "(ab:1.5)", prompt_2="cd")["prompt_embeds"] != plain
    second = embeds(xl, "ab", prompt_2="(cd:1.5)")["prompt_embeds"] != plain
    assert first[0, 1:3, :32].all() and not first[0, :, 32:].any()
    assert second[0, 1:3, 32:].all() and not second[0, :, :32].any()


def test_weights_with_clip_skip_scale_from_the_null_prompt_of_that_layer(pipe):
    zero, null = (embeds(pipe, prompt, clip_skip=1)["prompt_embeds"] for prompt in ("(ab:0)", ""))
    torch.testing.assert_close(zero[:, 1:3], null[:, 1:3])


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_clip_skip_reads_an_earlier_layer_of_both_encoders(xl, texts, clip_skip):
    xl = quiet(LatentShiftXLPipeline(**xl_components(texts)))
    for encoder in (xl.text_encoder, xl.text_encoder_2):
        encoder.config.num_hidden_layers = 2
        layers = (encoder.text_model if hasattr(encoder, "text_model") else encoder).encoder.layers
        layers.append(layers[0])
    tokens = xl.tokenizer("red", padding="max_length", return_tensors="pt").input_ids
    states = [
        encoder(tokens, output_hidden_states=True).hidden_states[-(clip_skip + 2)]
        for encoder in (xl.text_encoder, xl.text_encoder_2)
    ]
    torch.testing.assert_close(embeds(xl, "red", clip_skip=clip_skip)["prompt_embeds"], torch.cat(states, -1))


@pytest.mark.parametrize("clip_skip", [-1, 2, 0.5, True])
def test_clip_skip_refuses_layers_that_are_not_there(pipe, clip_skip):
    with pytest.raises(
        ValueError, match="clip_skip must be a whole number from 0 to 1, the layers of the text"
    ):
        embeds(pipe, clip_skip=clip_skip)


@pytest.mark.parametrize("family", ["pipe", "xl"])
@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"prompt": LONG}, "prompt"), ({"prompt": f"({LONG}:1.2)"}, "prompt"), ({"negative_prompt": LONG}, "negative_prompt")],
)  # fmt: skip
def test_encode_prompts_warns_once_of_the_words_that_are_cut(family, request, caplog, arguments, name):
    pipe = request.getfixturevalue(family)
    embeds(pipe, "a red ball")
    assert not caplog.records
    embeds(pipe, **arguments)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("latent_shift", logging.WARNING)
    # 18 letters are read: "a red ball rolls over a"
    assert record.getMessage() == (
        f"{name} is truncated to the 20 tokens that the text encoder reads; not read of {LONG!r}: 'green field'"
    )


def test_encode_prompts_warns_of_the_second_prompt_of_xl(xl, caplog):
    embeds(xl, "red", prompt_2=LONG)
    assert [record.getMessage().split(" is truncated")[0] for record in caplog.records] == ["prompt_2"]


def test_textual_inversions_count_with_all_their_vectors(texts, caplog):
    pipe = sd(texts)
    pipe.load_textual_inversion({"<toy>": torch.randn(17, 32)}, token="<toy>")
    caplog.clear()
    embeds(pipe, "<toy> a")
    assert not caplog.records
    embeds(pipe, "<toy> (ab:1.3)")
    assert caplog.records[0].getMessage().endswith(": 'b'")


def test_encode_captions_warns_of_the_first_and_counts_the_others(
    packed, texts, autoencoder, tmp_path, caplog
):
    from latent_shift.data.encode import encode

    encode(packed, tmp_path / "latents", autoencoder=autoencoder, texts=texts)
    assert not caplog.records  # "a green square" fits
    tokenizer = sd(texts).tokenizer
    tokenizer.model_max_length = 12
    (tmp_path / "short").mkdir()
    tokenizer.save_pretrained(tmp_path / "short" / "tokenizer")
    sd(texts).text_encoder.save_pretrained(tmp_path / "short" / "text_encoder")
    encode(packed, tmp_path / "cut", autoencoder=autoencoder, texts=tmp_path / "short")
    (message,) = [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]
    assert "captions are truncated to the 12 tokens that the text encoder reads; not read of 'a " in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "expected prompt as a text or a list of texts, got an empty list"),
        ({"prompt": 5}, "expected prompt as a text or a list of texts, got 5"),
        ({"prompt": ["red", None]}, r"expected prompt as a text or a list of texts, got \['red', None\]"),
        ({"prompt": "red", "negative_prompt": 3}, "expected negative_prompt as a text"),
        (
            {"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]},
            "as many of negative_prompt as prompts, 2, got 3",
        ),
        ({"prompt": {}}, r"expected prompts for frames from 0 to 5, got \[\]"),
        ({"prompt": {"0": "red"}}, r"expected prompts for frames from 0 to 5, got \['0'\]"),
        (
            {"prompt_embeds": torch.zeros(1, 20, 31)},
            r"expected prompt_embeds of shape \(clips, tokens, 32\) .* got \(1, 20, 31\)",
        ),
        (
            {"prompt_embeds": torch.full((1, 20, 32), torch.nan)},
            "prompt_embeds holds NaN or infinite numbers",
        ),
        ({"prompt_embeds": [[0.0]]}, "got list"),
        (
            {"prompt": {0: "red", 2: "blue"}, "negative_prompt": ["a", "b"]},
            "expected one negative prompt beside prompts that change, got 2",
        ),
    ],
)
def test_call_refuses_prompts_that_are_none(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_weights_of_the_second_negative_prompt_alone(xl):
    """The first text encoder then reads the empty prompt."""
    clips = [xl("a", negative_prompt_2=words, generator=seed(0)).frames for words in ("(b:-1)", "b", "(b:1)")]
    assert np.abs(clips[0] - clips[1]).max() > 0
    np.testing.assert_array_equal(clips[1], clips[2])


def test_plain_prompt_is_the_words():
    assert plain_prompt("a (red:1.5) square (big: 0.5)") == "a red square big"


def test_silenced_silences_its_own_thread_alone(caplog):
    logger, inside, done = logging.getLogger("some_library"), threading.Event(), threading.Event()

    def be_silent():
        with silenced("some_library"), silenced("another"):
            logger.warning("in silence")
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=be_silent)
    thread.start()
    inside.wait(10)
    with silenced("some_library"):  # begins later and ends earlier
        pass
    logger.warning("beside")
    done.set()
    thread.join()
    logger.warning("after")
    assert caplog.messages == ["beside", "after"]
