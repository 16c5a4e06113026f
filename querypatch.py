"""querypatch: pretrain the detection transformer, not only its backbone. The command line.

Each command imports what it needs when it is called: torch and Ray take seconds to import, and
`querypatch --help` should not.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from cluster.cli.chaos import chaos
from cluster.cli.jobs import jobs_cli
from cluster.cli.node import node_app
from cluster.cli.preflight import preflight
from cluster.cli.render import render_app
from cluster.cli.shards import shards_app
from cluster.cli.show import show_app
from cluster.cli.study import study_app
from cluster.cli.words import (
    CHATTY,
    Address,
    Continue,
    Depth,
    Device,
    ExportFormat,
    Follow,
    Insecure,
    Kind,
    LabelledSet,
    Local,
    Overrides,
    Overwrite,
    PicturesFolder,
    RecipeName,
    StageName,
    Weights,
    console,
    is_jobs_address,
    keep_ray_on_loopback,
    one_line_errors,
)

if TYPE_CHECKING:
    from cluster.jobs.submitting import Order
    from cluster.stages import Recipe
    from finetune.predict import LoadedDetector

app = typer.Typer(
    help="Pretrain a DETR transformer on unlabelled pictures, and finetune detectors from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipe_app = typer.Typer(help="All the settings of a run, as YAML.", no_args_is_help=True)
data_app = typer.Typer(help="Labelled sets: COCO, VOC, YOLO, shards.", no_args_is_help=True)
weights_app = typer.Typer(help="Files of weights, ours and others'.", no_args_is_help=True)
app.add_typer(jobs_cli)
app.command()(preflight)
app.command()(chaos)
app.add_typer(recipe_app, name="recipe")
app.add_typer(data_app, name="data")
app.add_typer(weights_app, name="weights")
app.add_typer(shards_app, name="shards")
app.add_typer(show_app, name="show")
app.add_typer(study_app, name="study")
app.add_typer(render_app, name="render")
app.add_typer(node_app, name="node", hidden=True)


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    local: Local = False,
    address: Address = None,
    go_on: Continue = False,
) -> None:
    """Pretrain a detection transformer: needs run=FOLDER and data.shards=FOLDER."""
    with one_line_errors():
        _start("pretrain", recipe, overrides or [], local, address, go_on)


@app.command()
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    local: Local = False,
    address: Address = None,
    go_on: Continue = False,
) -> None:
    """Train a detector on boxes: needs run=FOLDER, data.train=SET and init=WEIGHTS."""
    with one_line_errors():
        _start("finetune", recipe, overrides or [], local, address, go_on)


@app.command()
def resume(
    run: Annotated[str, typer.Argument(help="Folder of the run: a path or any fsspec URL.")],
    overrides: Overrides = None,
    local: Local = False,
    address: Address = None,
    follow: Follow = False,
    insecure: Insecure = False,
) -> None:
    """Continue a run from its newest whole checkpoint, at the very next batch."""
    with one_line_errors():
        if address is not None and is_jobs_address(address):
            from cluster.jobs.orders import resume_order

            _submit(resume_order(run, overrides or []), address, follow, insecure)
            return
        from cluster.preflight.inputs import resumed_recipe

        _run(resumed_recipe(run, overrides or []), local, address)


@app.command()
def demo(
    pictures: Annotated[
        Path | None, typer.Option(help="Learn from these pictures, not from drawn ones.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
) -> None:
    """The main job in minutes: pictures, shards, pretraining, a kill, a resume, pictures of it."""
    with one_line_errors():
        from cluster.demo import run_demo

        run_demo(out, pictures, Console())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What is installed, and which kernels run, and why; 1 if something is broken."""
    with one_line_errors():
        from cluster.doctor import doctor_json, doctor_text, findings, is_broken

        found = findings()
        typer.echo(doctor_json(found) if as_json else doctor_text(found))
        if is_broken(found):
            raise typer.Exit(1)


@app.command()
def evaluate(
    weights: Weights,
    data: LabelledSet,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of evaluation, e.g. max_pictures=500."),
    ] = None,
    device: Device = "auto",
    kind: Kind = None,
    pictures: PicturesFolder = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="JSON to write as well.")] = None,
) -> None:
    """Judge weights on a labelled set: COCO's twelve numbers or VOC's AP, by class."""
    with one_line_errors():
        from cluster.commands.weights import evaluate_weights

        evaluate_weights(
            weights, data, overrides or [], device, out, Console(), console(), kind, pictures
        )


@app.command()
def predict(
    weights: Weights,
    pictures: Annotated[
        list[str], typer.Argument(help="Files, globs, folders, URLs; - reads a list from stdin.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for drawings and json.")],
    threshold: Annotated[
        float | None, typer.Option(help="Least score, 0 to 1; default 0.5, of segments 0.85.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures at once.")] = 8,
    query: Annotated[
        list[str] | None,
        typer.Option(help="One-shot weights: a crop of what to look for; may be repeated."),
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Find objects in pictures: drawn pictures and COCO results; 1 if a picture was left out."""
    with one_line_errors():
        from cluster.commands.weights import predict_files

        if predict_files(
            weights, pictures, out, threshold, batch_size, query or [], device, overwrite,
            console(),
        ):  # fmt: skip
            raise typer.Exit(1)


@app.command()
def export(
    source: Weights,
    destination: Annotated[str, typer.Argument(help="Folder, .pth or .onnx; path or URL.")],
    format: Annotated[ExportFormat, typer.Option(help="Whose names and files.")] = "querypatch",
    pictures: Annotated[
        list[str] | None, typer.Option(help="Pictures to check an ONNX file on; may be repeated.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write weights for use elsewhere: ours, the public DETR code's, transformers', or ONNX."""
    with one_line_errors():
        from cluster.commands.weights import export_weights

        export_weights(source, destination, format, pictures or [], overwrite, console())


@weights_app.command("show")
def weights_show(source: Weights) -> None:
    """What a file, export or run holds: architecture, classes, tensors by part, origin."""
    with one_line_errors():
        from cluster.commands.weights import weights_text

        typer.echo(weights_text(source))


@data_app.command("check")
def data_check(
    data: LabelledSet,
    kind: Kind = None,
    pictures: PicturesFolder = None,
    depth: Annotated[Depth, typer.Option(help="How much of each picture is read.")] = "headers",
    num_classes: Annotated[
        int | None, typer.Option(help="Of a head made elsewhere: has every label its output?")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File for all faults.")] = None,
) -> None:
    """Name every fault of a labelled set with its file and object; 1 if any is an error."""
    with one_line_errors():
        from cluster.commands.labelled_sets import check_data

        if not check_data(data, kind, pictures, console(), depth, num_classes, out):
            raise typer.Exit(1)


@recipe_app.command("list")
def recipe_list() -> None:
    """The recipes that come with querypatch, each with its first line."""
    from cluster.stages import list_recipes

    for name, line in list_recipes().items():
        typer.echo(f"{name:50} {line}")


@recipe_app.command("show")
def recipe_show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """A recipe with every value resolved; what only you can say is shown as null."""
    with one_line_errors():
        from cluster.stages import show_recipe

        typer.echo(show_recipe(recipe, overrides or []), nl=False)


@recipe_app.command("schema")
def recipe_schema(
    stage: Annotated[StageName, typer.Argument(help="Of which command.")] = "pretrain",
) -> None:
    """The JSON schema of recipes, for editors that complete and check YAML."""
    from cluster.stages import recipe_kind
    from training import recipe

    typer.echo(json.dumps(recipe.recipe_schema(recipe_kind(stage)), indent=1))


def load_detector(source: str, device: Literal["auto", "cpu", "cuda"] = "auto") -> "LoadedDetector":
    """A detector that is ready to predict, from a file, an export, a run, or others' weights.

    `detector.predict(images, threshold=0.5)` takes paths, URLs, bytes, PIL pictures or uint8 arrays
    (height x width x 3) and gives labels, names, scores and `boxes_xyxy` in pixels of each picture.
    Raises WeightsError where there are no such weights.
    """
    from finetune.predict import load_detector

    return load_detector(source, device)


def main() -> None:
    """The `querypatch` command."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    app()


def _start(
    stage: StageName,
    recipe: str,
    overrides: list[str],
    local: bool,
    address: str | None,
    go_on: bool,
) -> None:
    if address is not None and is_jobs_address(address):
        from cluster.jobs.orders import start_order

        _submit(start_order(recipe, overrides, stage=stage), address)
        return
    from cluster.jobs.continuing import begun_or_continued, told_over
    from cluster.preflight.inputs import checked_new_run
    from cluster.stages import recipe_of

    if not go_on:
        _run(checked_new_run(recipe_of(stage, recipe, overrides)), local, address)
        return
    continued = begun_or_continued(stage, recipe, overrides)
    over = told_over(continued)
    if over is None:
        _run(continued, local, address)
    else:
        typer.echo(over)


def _submit(order: "Order", address: str, follow: bool = False, insecure: bool = False) -> None:
    from cluster.jobs.commands import Submission, submit_order

    if not submit_order(order, Submission(address, insecure, follow), console()):
        raise typer.Exit(1)


def _run(recipe: "Recipe", local: bool, address: str | None) -> None:
    if local:
        from cluster.worker import run_alone

        run_alone(recipe, Console())
    else:
        if address is None:
            keep_ray_on_loopback()
        from cluster.launch import run_with_ray

        run_with_ray(recipe, address, Console())


if __name__ == "__main__":
    main()
