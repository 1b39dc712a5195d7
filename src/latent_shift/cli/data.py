"""`latent-shift data`: folders of captioned videos, checked, packed and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latent_shift.cli.terminal import Progress
from latent_shift.runtime import quiet_libraries

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at and prepare folders of captioned videos.")

Folder = Annotated[
    str,
    typer.Argument(
        help="media files with metadata.jsonl, metadata.csv or .txt captions; WebDataset .tar shards, also by URL and with {000..127}; "
        "UCF-101; MSR-VTT"
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="processes that decode")]


@app.command()
def check(
    folder: Folder,
    frames: Annotated[int, typer.Option(min=1, help="frames a clip must have")] = 16,
    fps: Annotated[float, typer.Option(min=0.001, help="frames a second to look at")] = 8,
    aspects: Annotated[
        int | None, typer.Option(min=8, help="look at whole frames, packed with this factor, instead of their central squares")
    ] = None,
    workers: Workers = 2,
) -> None:
    """Read every file as training would and name each that is no good, with the reason."""
    from latent_shift.data.check import check as look

    counts, problems = look(folder, min_frames=frames, fps=fps, aspects=aspects, workers=workers)
    for name, reason in problems:
        print(f"{name}: {reason}")
    print(", ".join(f"{number} {what}" for what, number in counts.items()) + f", {len({name for name, _ in problems})} with problems")
    raise typer.Exit(1 if problems else 0)


@app.command()
def pack(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="where the packed frames go")],
    size: Annotated[int, typer.Option(min=8, help="side in pixels")] = 128,
    fps: Annotated[float, typer.Option(min=0.001, help="frames a second to keep")] = 8,
    aspects: Annotated[
        int | None, typer.Option(min=8, help="keep shapes: sizes with this factor instead of squares (64 for Stable Diffusion)")
    ] = None,
    split_cuts: Annotated[bool, typer.Option("--split-cuts", help="make one clip of each scene")] = False,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="megabytes of a shard")] = 64,
    workers: Workers = 2,
) -> None:
    """Decode every file once into shards of frames. What is in the folder of a packed data set is replaced."""
    from latent_shift.data.pack import pack
    from latent_shift.data.store import Store

    with Progress("packing") as progress:
        problems = pack(
            folder, out, size=size, fps=fps, aspects=aspects, split_cuts=split_cuts, shard_mb=shard_mb, workers=workers, progress=progress
        )
    for name, reason in problems:
        print(f"left out {name}: {reason}")
    store = Store(out)
    print(f"{out}: {len(store.records)} records, {store.num_frames} frames, {len(problems)} left out")


@app.command()
def likeness(latents: Annotated[Path, typer.Argument(help="an encoded data set")]) -> None:
    """Measure how alike the frames of the clips are, and say which noise matches: settings for `train`, as TABLE.KEY=VALUE."""
    quiet_libraries()
    from latent_shift.data.latents import LatentStore

    for name, value in LatentStore(latents).likeness().items():
        print(f"{name}={value:.3f}" if "." in name else f"{name}: {value:.3f}")


@app.command()
def preview(
    store: Annotated[Path, typer.Argument(help="a packed data set, or an encoded one")],
    out: Annotated[Path, typer.Argument(help="a .png")],
    rows: Annotated[int, typer.Option(min=1, help="clips")] = 8,
    columns: Annotated[int, typer.Option(min=1, help="frames of each")] = 8,
    num_frames: Annotated[int | None, typer.Option(min=1, help="as training with this data.num_frames draws them; default: all")] = None,
    stride: Annotated[int, typer.Option(min=1, help="every second frame (2), ...")] = 1,
    split: Annotated[list[str] | None, typer.Option(help="may be repeated; default train")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw clips and stills as training draws them, at random, so some may come twice: a row each under its caption. Captions are printed."""
    quiet_libraries()
    from latent_shift import video
    from latent_shift.data import latents, pack

    video.check_output(out)
    sheet, captions = pack.preview(
        latents.open_store(store),
        rows=rows,
        columns=columns,
        num_frames=num_frames,
        stride=stride,
        splits=tuple(split or ["train"]),
        seed=seed,
    )
    print("\n".join(captions))
    print(video.write(sheet[None], out))
