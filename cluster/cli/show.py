"""`querypatch show`: what goes in and what comes out, drawn."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.words import Kind, LabelledSet, Out, PicturesFolder, Weights, one_line_errors

show_app = typer.Typer(help="Draw what goes in and what comes out.", no_args_is_help=True)


@show_app.command("patches")
def show_patches(
    url: Annotated[str, typer.Argument(help="A run, or a folder of shards.")],
    out: Out = Path("patches.png"),
    count: Annotated[int, typer.Option(help="Pictures to draw.")] = 6,
) -> None:
    """Draw pictures with their query patches and, for a run, what its newest weights find."""
    with one_line_errors():
        from pretrain.gallery import draw_patches

        draw_patches(url, out, count)
        typer.echo(f"wrote {out}")


@show_app.command("data")
def show_data(
    data: LabelledSet,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of data.augment, e.g. kind=none."),
    ] = None,
    kind: Kind = None,
    pictures: PicturesFolder = None,
    out: Out = Path("data.png"),
    count: Annotated[int, typer.Option(help="Pictures to draw.")] = 12,
) -> None:
    """Draw a labelled set's pictures and boxes as training sees them."""
    with one_line_errors():
        from finetune.show_data import draw_data

        drawn = draw_data(data, out, count, overrides=overrides or [], kind=kind, pictures=pictures)
        for picture in drawn.skipped:
            typer.secho(f"skipped {picture}", err=True)
        typer.echo(f"wrote {out}: {drawn.num_pictures} pictures, {drawn.num_boxes} boxes")


@show_app.command("points")
def show_points(
    weights: Weights,
    pictures: Annotated[list[str], typer.Argument(help="Files, globs, folders, URLs.")],
    backbone: Annotated[
        list[str] | None,
        typer.Option(help="WEIGHTS are those of a DAT alone: its settings, e.g. name=dat_t."),
    ] = None,
    at: Annotated[
        tuple[float, float] | None,
        typer.Option(help="The query that looks: X and Y from 0 to 1. Default: all do."),
    ] = None,
    out: Out = Path("points.png"),
) -> None:
    """Draw where the deformable attention of a DAT looks in pictures."""
    with one_line_errors():
        from finetune.show_points import draw_points

        drawn = draw_points(weights, pictures, out, backbone or [], at)
        typer.echo(f"wrote {out}: {drawn} pictures")


@show_app.command("curves")
def show_curves(
    runs: Annotated[list[str], typer.Argument(help="Runs to draw side by side.")],
    out: Out = Path("curves.png"),
    number: Annotated[
        list[str] | None,
        typer.Option(help="Of the record, e.g. eval/ap50; may be repeated. Default: loss, AP."),
    ] = None,
) -> None:
    """Draw learning curves, one line per run."""
    with one_line_errors():
        from training.curves import draw_runs

        draw_runs(runs, number or ["loss", "eval/ap", "eval/ap50"], out)
        typer.echo(f"wrote {out}")
