"""querypatch: pretrain the detection transformer, not only its backbone. The command line.

Each command imports what it needs when it is called: torch and Ray take seconds to import, and
`querypatch --help` should not.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from cluster.stages import Recipe
    from finetune.predict import LoadedDetector

app = typer.Typer(
    help="Pretrain a DETR transformer on unlabelled pictures, and finetune detectors from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipe_app = typer.Typer(help="All the settings of a run, as YAML.", no_args_is_help=True)
shards_app = typer.Typer(help="Pictures in WebDataset tars with an index.", no_args_is_help=True)
show_app = typer.Typer(help="Draw what goes in and what comes out.", no_args_is_help=True)
data_app = typer.Typer(help="Labelled sets: COCO, VOC, YOLO, shards.", no_args_is_help=True)
weights_app = typer.Typer(help="Files of weights, ours and others'.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
app.add_typer(data_app, name="data")
app.add_typer(weights_app, name="weights")
app.add_typer(shards_app, name="shards")
app.add_typer(show_app, name="show")

RecipeName = Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Laid over the recipe.")
]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster; default: a local one.")]
Weights = Annotated[
    str, typer.Argument(help="A run, an export, a checkpoint file, ours or others'; path or URL.")
]
LabelledSet = Annotated[
    str, typer.Argument(help="COCO json, VOC root, data.yaml or shards; URL#SPLIT names a split.")
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU where there is one.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
# Written out here, since importing their modules takes seconds; a test holds them to the originals.
StageName = Literal["pretrain", "finetune"]
SourceKind = Literal["classes", "folder", "list", "tars", "coco", "voc", "yolo"]
SetKind = Literal["shards", "coco", "coco_panoptic", "voc", "yolo"]
ExportFormat = Literal["querypatch", "detr", "hf", "onnx"]
Depth = Literal["annotations", "headers", "pixels"]
Kind = Annotated[SetKind | None, typer.Option(help="What DATA is; default: found out.")]
PicturesFolder = Annotated[str | None, typer.Option(help="Folder of a COCO json's pictures.")]
Url = Annotated[str, typer.Argument(help="Folder: a path or any fsspec URL.")]


@app.command()
def pretrain(
    recipe: RecipeName, overrides: Overrides = None, local: Local = False, address: Address = None
) -> None:
    """Pretrain a detection transformer: needs run=FOLDER and data.shards=FOLDER."""
    with _one_line_errors():
        _start("pretrain", recipe, overrides or [], local, address)


@app.command()
def finetune(
    recipe: RecipeName, overrides: Overrides = None, local: Local = False, address: Address = None
) -> None:
    """Train a detector on boxes: needs run=FOLDER, data.train=SET and init=WEIGHTS."""
    with _one_line_errors():
        _start("finetune", recipe, overrides or [], local, address)


@app.command()
def resume(
    run: Annotated[str, typer.Argument(help="Folder of the run: a path or any fsspec URL.")],
    overrides: Overrides = None,
    local: Local = False,
    address: Address = None,
) -> None:
    """Continue a run from its newest whole checkpoint, at the very next batch."""
    with _one_line_errors():
        from cluster.preflight import resumed_recipe

        _run(resumed_recipe(run, overrides or []), local, address)


@app.command()
def demo(
    pictures: Annotated[
        Path | None, typer.Option(help="Learn from these pictures, not from drawn ones.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
) -> None:
    """The main job in minutes: pictures, shards, pretraining, a kill, a resume, pictures of it."""
    with _one_line_errors():
        from cluster.demo import run_demo

        run_demo(out, pictures, Console())


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
    with _one_line_errors():
        from cluster.weight_commands import evaluate_weights

        evaluate_weights(
            weights, data, overrides or [], device, out, Console(), _console(), kind, pictures
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
    with _one_line_errors():
        from cluster.weight_commands import predict_files

        if predict_files(
            weights, pictures, out, threshold, batch_size, query or [], device, overwrite,
            _console(),
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
    with _one_line_errors():
        from cluster.weight_commands import export_weights

        export_weights(source, destination, format, pictures or [], overwrite, _console())


@weights_app.command("show")
def weights_show(source: Weights) -> None:
    """What a file, export or run holds: architecture, classes, tensors by part, origin."""
    with _one_line_errors():
        from cluster.weight_commands import weights_text

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
    with _one_line_errors():
        from cluster.data_commands import check_data

        if not check_data(data, kind, pictures, _console(), depth, num_classes, out):
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
    with _one_line_errors():
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
    with _one_line_errors():
        from cluster.shard_commands import write_folder
        from data.shards import ShardSettings

        settings = ShardSettings(
            seed=seed, samples_per_shard=samples_per_shard, max_bad_share=max_bad_share
        )
        write_folder(
            source, destination, settings, kind, pictures, ignore or [], hold_out, _console()
        )


@shards_app.command("index")
def shards_index(url: Url) -> None:
    """Index tars that somebody else made, so that any sample can be read by its number."""
    with _one_line_errors():
        from cluster.shard_commands import index_folder

        index_folder(url, _console())


@shards_app.command("check")
def shards_check(url: Url) -> None:
    """Name every missing, cut or changed shard, double key and broken picture; 1 if any."""
    with _one_line_errors():
        from cluster.shard_commands import check_folder

        if check_folder(url, _console()):
            raise typer.Exit(1)


@show_app.command("patches")
def show_patches(
    url: Annotated[str, typer.Argument(help="A run, or a folder of shards.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")] = Path("patches.png"),
    count: Annotated[int, typer.Option(help="Pictures to draw.")] = 6,
) -> None:
    """Draw pictures with their query patches and, for a run, what its newest weights find."""
    with _one_line_errors():
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
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")] = Path("data.png"),
    count: Annotated[int, typer.Option(help="Pictures to draw.")] = 12,
) -> None:
    """Draw a labelled set's pictures and boxes as training sees them."""
    with _one_line_errors():
        from finetune.show_data import draw_data

        drawn = draw_data(data, out, count, overrides=overrides or [], kind=kind, pictures=pictures)
        for picture in drawn.skipped:
            typer.secho(f"skipped {picture}", err=True)
        typer.echo(f"wrote {out}: {drawn.num_pictures} pictures, {drawn.num_boxes} boxes")


@show_app.command("curves")
def show_curves(
    runs: Annotated[list[str], typer.Argument(help="Runs to draw side by side.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")] = Path("curves.png"),
    number: Annotated[
        list[str] | None,
        typer.Option(help="Of the record, e.g. eval/ap50; may be repeated. Default: loss, AP."),
    ] = None,
) -> None:
    """Draw learning curves, one line per run."""
    with _one_line_errors():
        from training.curves import draw_runs

        draw_runs(runs, number or ["loss", "eval/ap", "eval/ap50"], out)
        typer.echo(f"wrote {out}")


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
    for chatty in ("onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    app()


def _start(
    stage: StageName, recipe: str, overrides: list[str], local: bool, address: str | None
) -> None:
    from cluster.preflight import checked_new_run
    from cluster.stages import recipe_of

    _run(checked_new_run(recipe_of(stage, recipe, overrides)), local, address)


def _run(recipe: "Recipe", local: bool, address: str | None) -> None:
    if local:
        from cluster.worker import run_alone

        run_alone(recipe, Console())
    else:
        from cluster.launch import run_with_ray

        run_with_ray(recipe, address, Console())


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors that name the way out are shown as they are; QUERYPATCH_TRACEBACK=1 shows it all."""
    try:
        yield
    except typer.Exit:
        raise
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("QUERYPATCH_TRACEBACK"):
            raise
        typer.secho(f"querypatch: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None


def _console() -> Console:
    return Console(file=sys.stderr)


if __name__ == "__main__":
    main()
