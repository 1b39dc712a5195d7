"""`latent-shift data`: check, pack and preview folders of captioned videos."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import latent_shift
from latent_shift.cli import outputs
from latent_shift.cli.terminal import Progress
from latent_shift.runtime import quiet_libraries

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Check, pack and preview captioned videos."
)

Folder = Annotated[
    str,
    typer.Argument(
        help="media files with metadata.jsonl, metadata.csv or .txt captions; WebDataset .tar shards, also as URLs "
        "and with {000..127}; UCF-101; MSR-VTT"
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="number of processes that decode")]
Frames = Annotated[
    int, typer.Option(min=1, help="minimum number of frames per clip; shorter ones are reported")
]

FolderForce = Annotated[
    bool,
    typer.Option("--force", help="write into a folder that holds something else; its other files are kept"),
]


@app.command()
def check(
    folder: Folder,
    frames: Frames = 16,
    fps: Annotated[float, typer.Option(min=0.001, help="frames per second at which clips are inspected")] = 8,
    size: Annotated[
        int | None,
        typer.Option(min=8, help="side of the frames that will be packed; reports clips that this enlarges"),
    ] = None,
    aspects: Annotated[
        int | None,
        typer.Option(min=8, help="inspect whole frames, as `pack --aspects` keeps them, not central squares"),
    ] = None,
    workers: Workers = 2,
) -> None:
    """List files that cannot be used and clips with flaws, each with the reason and what `pack` does with it.
    Clips are decoded as in training. Exits with 1 if there are any."""
    from latent_shift.data import check as checks

    counts, problems = checks.check(
        folder, min_frames=frames, fps=fps, size=size, aspects=aspects, workers=workers
    )
    for problem in problems:
        print(problem)
    summary = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    flawed = {problem.file_name for problem in problems if problem.outcome != "ignored"}
    print(f"{summary}, {len(flawed)} with problems")
    raise typer.Exit(1 if flawed else 0)


@app.command()
def pack(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="output folder")],
    size: Annotated[int, typer.Option(min=8, help="side of the frames in pixels")] = 128,
    fps: Annotated[float, typer.Option(min=0.001, help="frames per second")] = 8,
    aspects: Annotated[
        int | None,
        typer.Option(
            min=8, help="keep aspect ratios, with sides that are multiples of this (64 for Stable Diffusion)"
        ),
    ] = None,
    split_cuts: Annotated[
        bool, typer.Option("--split-cuts", help="store each scene as a clip of its own")
    ] = False,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="size of a shard in megabytes")] = 64,
    frames: Frames = 16,
    workers: Workers = 2,
    force: FolderForce = False,
) -> None:
    """Decode every clip once into shards of frames. A packed data set in the output folder is replaced once the
    new one is complete."""
    from latent_shift.data import pack as packing
    from latent_shift.data.records import summarize
    from latent_shift.data.store import Store

    with Progress("packing") as progress:
        problems = packing.pack(
            folder,
            out,
            size=size,
            fps=fps,
            aspects=aspects,
            split_cuts=split_cuts,
            shard_mb=shard_mb,
            min_frames=frames,
            workers=workers,
            force=force,
            progress=progress,
        )
    print("".join(f"{line}\n" for line in summarize(problems, out / "problems.txt")), end="")
    store = Store(out)
    num_skipped = sum(problem.outcome == "skipped" for problem in problems)
    print(f"{out}: {len(store.records)} records, {store.num_frames} frames, {num_skipped} skipped")


@app.command()
def noise(latents: Annotated[Path, typer.Argument(help="an encoded data set")]) -> None:
    """Measure the correlation between frames. Prints the settings of the noise that matches it, for
    `train`."""
    quiet_libraries()
    from latent_shift.data.latents import LatentStore

    for name, value in LatentStore(latents).frame_correlation().items():
        print(f"{name}={value:.3f}" if "." in name else f"{name}: {value:.3f}")


@app.command(hidden=True)
def likeness(latents: Annotated[Path, typer.Argument(help="an encoded data set")]) -> None:
    """Run `noise` under its former name."""
    notice = (
        "latent-shift data likeness is now latent-shift data noise; the old name will go in the next release"
    )
    print(notice, file=sys.stderr)
    noise(latents)


@app.command()
def preview(
    store: Annotated[Path, typer.Argument(help="a packed or encoded data set")],
    out: Annotated[Path, typer.Argument(help="output file, .png")],
    rows: Annotated[int, typer.Option(min=1, help="number of clips")] = 8,
    show_all: Annotated[bool, typer.Option("--all", help="show every clip, whatever --rows")] = False,
    columns: Annotated[int, typer.Option(min=1, help="frames shown per clip")] = 8,
    num_frames: Annotated[
        int | None,
        typer.Option(min=1, help="number of frames per clip, as data.num_frames; default: whole clips"),
    ] = None,
    stride: Annotated[int, typer.Option(min=1, help="show every n-th frame")] = 1,
    split: Annotated[
        list[str] | None,
        typer.Option(help="split to sample from, may be repeated; default: train"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    force: outputs.Force = False,
) -> None:
    """Draw a contact sheet of different clips with their whole captions. Every concept is equally likely, as in
    training."""
    quiet_libraries()
    from latent_shift import video
    from latent_shift.data import latents
    from latent_shift.data import preview as previews
    from latent_shift.data.records import escape

    replaced = outputs.check_outputs([out], suffixes=video.OUTPUT_SUFFIXES, inputs=[store], force=force)
    opened, splits = latents.open_store(store), tuple(split or ["train"])
    sheet, captions = previews.preview(
        opened,
        rows=None if show_all else rows,
        columns=columns,
        num_frames=num_frames,
        stride=stride,
        splits=splits,
        seed=seed,
    )
    print("\n".join(map(escape, captions)))
    print(f"{len(captions)} of {len(opened.records)} clips")
    settings = {"data_set": store, "rows": len(captions), "columns": columns, "splits": splits, "seed": seed}
    metadata = {"latent_shift": latent_shift.__version__} | {
        key: str(value) for key, value in settings.items()
    }
    outputs.write_all(sheet[None], [out], fps=1, metadata=metadata, replaced=replaced)
