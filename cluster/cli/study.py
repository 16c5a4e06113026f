"""`querypatch study`: what a setting of finished weights brings, and costs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.words import Device, LabelledSet, Out, Weights, console, one_line_errors

study_app = typer.Typer(help="What a setting brings, and what it costs.", no_args_is_help=True)


@study_app.callback()
def study() -> None:
    """Studies of finished weights: one figure and all numbers as JSON."""


@study_app.command("keep-ratio")
def study_keep_ratio(
    weights: Weights,
    data: LabelledSet,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of evaluation, e.g. max_pictures=500."),
    ] = None,
    rho: Annotated[
        list[float] | None, typer.Option(help="A keep ratio; may be repeated. Default: 0.1 to 1.")
    ] = None,
    device: Device = "auto",
    out: Out = Path("rho.png"),
) -> None:
    """AP, time and multiply-adds of Sparse DETR weights over the share of tokens that is kept."""
    with one_line_errors():
        from cluster.commands.studies import draw_keep_ratios

        draw_keep_ratios(
            weights, data, overrides or [], rho or [], device, out, Console(), console()
        )


@study_app.command("decoder-depth")
def study_decoder_depth(
    weights: Weights,
    data: LabelledSet,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of evaluation, e.g. max_pictures=500."),
    ] = None,
    device: Device = "auto",
    out: Out = Path("depth.png"),
) -> None:
    """AP of each decoder layer of finished weights, and parameters and multiply-adds by part."""
    with one_line_errors():
        from cluster.commands.studies import draw_depths

        draw_depths(weights, data, overrides or [], device, out, Console(), console())
