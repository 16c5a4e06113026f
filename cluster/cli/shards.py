"""`querypatch shards`: pictures in WebDataset tars with an index."""

from typing import Annotated

import typer

from cluster.cli.words import PicturesFolder, SourceKind, Url, console, one_line_errors

shards_app = typer.Typer(help="Pictures in WebDataset tars with an index.", no_args_is_help=True)


@shards_app.command("write")
def shards_write(
    source: Annotated[
        str, typer.Argument(help="Folder tree, list, tars, COCO, VOC, YOLO; path or URL#SPLIT.")
    ],
    destination: Url,
    kind: Annotated[SourceKind | None, typer.Option(help="What SOURCE is.")] = None,
    pictures: PicturesFolder = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Files to pass over: *.txt")] = None,
    hold_out: Annotated[
        int, typer.Option(help="Pictures to hold out: DESTINATION/held_out beside .../train.")
    ] = 0,
    samples_per_shard: Annotated[int, typer.Option(help="Pictures in one shard.")] = 1000,
    max_bad_share: Annotated[float, typer.Option(help="Stop where more are broken.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the order in which pictures are stored.")] = 0,
) -> None:
    """Write pictures to shards with an index; interrupted, the same command continues."""
    with one_line_errors():
        from cluster.commands.shards import write_folder
        from data.shards import ShardSettings

        settings = ShardSettings(
            seed=seed, samples_per_shard=samples_per_shard, max_bad_share=max_bad_share
        )
        write_folder(
            source, destination, settings, kind, pictures, ignore or [], hold_out, console()
        )


@shards_app.command("index")
def shards_index(url: Url) -> None:
    """Index tars that somebody else made, so that any sample can be read by its number."""
    with one_line_errors():
        from cluster.commands.shards import index_folder

        index_folder(url, console())


@shards_app.command("check")
def shards_check(url: Url) -> None:
    """Name every missing, cut or changed shard, double key and broken picture; 1 if any."""
    with one_line_errors():
        from cluster.commands.shards import check_folder

        if check_folder(url, console()):
            raise typer.Exit(1)
