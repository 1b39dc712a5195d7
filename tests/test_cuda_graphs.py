"""Which calls become CUDA graphs and which graph a call takes; on a GPU, the graphs themselves.

Without a GPU a recording runs the call again on its own inputs and writes into its own outputs, as a replay does.
"""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from test_shift import tiny_unet

from latent_shift import cuda_graphs, shift_kernels
from latent_shift.cuda_graphs import use_cuda_graphs
from latent_shift.runtime import seed
from latent_shift.shift import Shift, ShiftGroupNorm, frames, inflate, streaming

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def replays(monkeypatch):
    """Record on the CPU; returns a list that grows by one with every replay."""
    replayed = []

    def record(call, device):
        outputs = call()

        def replay():
            replayed.append(1)
            for own, new in zip(outputs, call(), strict=True):
                own.copy_(new)

        return outputs, replay

    monkeypatch.setattr(cuda_graphs, "_can_record", lambda sample: True)
    monkeypatch.setattr(cuda_graphs, "_record", record)
    return replayed


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return inflate(tiny_unet(), Shift()).eval()


def inputs(unet, number=0, frames=2):
    generator = seed(number)
    sample = torch.randn(frames, 4, 8, 8, generator=generator)
    return (
        sample,
        10 * number + 1,
        torch.randn(frames, 3, unet.config.cross_attention_dim, generator=generator),
    )


@torch.no_grad()
def call(unet, number=0, num_frames=2, **options):
    with frames(unet, num_frames, edge=options.pop("edge", None)):
        return unet(*inputs(unet, number), return_dict=False, **options)[0]


def test_outputs_are_those_of_the_network(unet, replays):
    expected = [call(unet, number) for number in range(4)]
    graphs = use_cuda_graphs(unet)
    found = [call(unet, number) for number in range(4)]
    assert all(map(torch.equal, found, expected))
    assert len(replays) == 3  # the first call is none, the second is recorded and compared
    assert len(graphs.graphs) == 1


def test_a_recording_keeps_no_output_of_a_caller(unet, replays):
    use_cuda_graphs(unet)
    first, second, third = (call(unet, 0), call(unet, 0), call(unet, 0))
    call(unet, 1)
    assert torch.equal(first, third) and torch.equal(second, third)


def test_a_recording_keeps_the_tables_of_the_shift(unet, replays, monkeypatch):
    """A graph reads their memory, whatever the cache drops."""
    monkeypatch.setattr(shift_kernels, "_tables", OrderedDict())
    graphs = use_cuda_graphs(unet)
    for _ in range(2):
        call(unet)
    tables = set(map(id, shift_kernels._tables.values()))
    (recording,) = graphs.graphs.values()
    widths = {layer.num_channels for layer in unet.modules() if isinstance(layer, ShiftGroupNorm)}
    assert len(tables) == len(widths) and set(map(id, recording.tables)) == tables


def test_frames_edges_and_shapes_have_graphs_of_their_own(unet, replays):
    graphs = use_cuda_graphs(unet)
    ways = [{}, {"num_frames": 1}, {"edge": "wrap"}]
    plain = copy.deepcopy(unet)
    for _ in range(3):
        for way in ways:
            assert torch.equal(call(unet, **way), call(plain, **way))
    assert len(graphs.graphs) == 3


def test_the_graphs_used_last_are_kept(unet, replays):
    graphs = use_cuda_graphs(unet, max_graphs=2)
    for edge in ("zero", "hold", "zero", "hold", "zero", "wrap", "wrap"):
        call(unet, edge=edge)
    assert [key[4] for key in graphs.graphs] == ["zero", "wrap"]


def test_other_weights_are_seen(unet, replays):
    graphs = use_cuda_graphs(unet)
    before = [call(unet) for _ in range(3)][-1]
    with torch.no_grad():  # in place: the graph reads them
        unet.conv_in.weight.mul_(2)
    changed = call(unet)
    assert not torch.equal(changed, before)
    assert (len(graphs.graphs), len(replays)) == (1, 3)
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    state["conv_in.weight"] /= 2
    unet.load_state_dict(state, assign=True)  # elsewhere: another graph
    assert all(torch.equal(call(unet), before) for _ in range(2))
    assert (len(graphs.graphs), len(replays)) == (2, 4)
    block = unet.mid_block.resnets[0].conv1
    block.weight = torch.nn.Parameter(block.weight.detach().clone())
    assert all(torch.equal(call(unet), before) for _ in range(2))
    unet.set_attn_processor(AttnProcessor())
    assert all(torch.allclose(call(unet), before, atol=1e-5) for _ in range(2))
    unet.enable_freeu(0.5, 0.5, 1.5, 1.5)
    assert not any(torch.equal(call(unet), before) for _ in range(2))
    assert (len(graphs.graphs), len(replays)) == (5, 7)


def test_calls_that_a_graph_cannot_repeat_run_as_before(unet, replays):
    graphs = use_cuda_graphs(unet)
    for _ in range(3):
        with frames(unet, 2):
            unet(*inputs(unet))  # with gradients
        call(unet, cross_attention_kwargs={"scale": 0.5})
        with torch.autocast("cpu", torch.bfloat16):
            call(unet)
    causal = inflate(tiny_unet(), Shift(backward=0)).eval()
    streamed = use_cuda_graphs(causal)
    memory = {}
    with torch.no_grad(), streaming(causal, memory):
        for _ in range(3):
            causal(*inputs(causal))
    assert not replays and not graphs.graphs and not streamed.graphs


def test_a_graph_that_differs_is_not_used(unet, monkeypatch, replays, caplog):
    expected = call(unet)
    monkeypatch.setattr(cuda_graphs, "_equal", lambda a, b: False)
    use_cuda_graphs(unet)
    assert all(torch.equal(call(unet), expected) for _ in range(4))
    assert len(replays) == 1
    assert caplog.text.count("no CUDA graph for inputs") == 1 and "its output differs" in caplog.text


def test_a_failed_recording_is_told_once(unet, monkeypatch, replays, caplog):
    def fail(call, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "_record", fail)
    use_cuda_graphs(unet)
    for _ in range(4):
        call(unet)
    assert caplog.text.count("operation not permitted when stream is capturing") == 1
    assert "more" not in caplog.text


def test_copies_and_removal(unet, replays):
    expected = call(unet)
    graphs = use_cuda_graphs(unet)
    with pytest.raises(ValueError, match="has CUDA graphs already"):
        use_cuda_graphs(unet)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(unet)
    other = copy.deepcopy(unet)
    assert all(torch.equal(call(other), expected) for _ in range(3))
    assert not replays
    graphs.remove()
    assert "forward" not in vars(unet)
    assert torch.equal(pickle.loads(pickle.dumps(unet)).conv_in.weight, unet.conv_in.weight)
    with pytest.raises(ValueError, match="max_graphs must be 1 or more, got 0"):
        use_cuda_graphs(unet, max_graphs=0)


def test_the_pipeline_gives_the_same_clip(video_model, replays):
    from latent_shift.pipelines.loading import load

    pipe = load(video_model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    expected = pipe("a red square", generator=seed(0), **options).frames
    use_cuda_graphs(pipe.unet)
    assert torch.equal(pipe("a red square", generator=seed(0), **options).frames, expected)
    assert len(replays) == 3


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_graphs_on_a_gpu_equal_the_network(unet, dtype):
    unet.to("cuda", dtype)
    others = [
        [each.to("cuda", dtype) if torch.is_tensor(each) else each for each in inputs(unet, k)]
        for k in range(4)
    ]

    def outputs():
        with torch.no_grad(), frames(unet, 2):
            return [unet(*each, return_dict=False)[0] for each in others]

    expected = outputs()
    graphs = use_cuda_graphs(unet)
    assert all(map(torch.equal, outputs(), expected))
    assert [recording is not None for recording in graphs.graphs.values()] == [True]
