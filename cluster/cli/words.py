"""What the commands share: the words of their arguments, and how an error is told.

Nothing here waits for torch or Ray, which take seconds to import.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

CHATTY = ("onnxscript", "onnx_ir", "aiobotocore", "botocore")
"""Libraries that log what nobody asked for, such as where they found credentials."""

RecipeName = Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Laid over the recipe.")
]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray.")]
Continue = Annotated[
    bool, typer.Option("--continue", help="Go on where the run exists already, else begin it.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="A running Ray cluster: HOST:PORT or auto, or http://HEAD:8265 to submit a job there; "
        "default: a local one."
    ),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Of a job: show its log to its end.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Talk to a cluster that asks for no token.")
]
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
SetKind = Literal["shards", "coco", "coco_panoptic", "voc", "yolo", "classes"]
ExportFormat = Literal["querypatch", "detr", "hf", "onnx"]
Depth = Literal["annotations", "headers", "pixels"]
Kind = Annotated[SetKind | None, typer.Option(help="What DATA is; default: found out.")]
PicturesFolder = Annotated[str | None, typer.Option(help="Folder of a COCO json's pictures.")]
Url = Annotated[str, typer.Argument(help="Folder: a path or any fsspec URL.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")]


def is_jobs_address(address: str | None) -> bool:
    """Whether an address is of a cluster's Jobs API rather than of a cluster to join."""
    return address is not None and address.startswith(("http://", "https://"))


def keep_ray_on_loopback() -> None:
    """Lets a Ray of our own, on this machine, listen on loopback alone; before Ray is imported.

    Its dashboard does so anyway; its other ports would listen on all addresses (seen with 2.60).
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@contextmanager
def one_line_errors() -> Iterator[None]:
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


def console() -> Console:
    """The one that speaks beside a command's answer, on stderr."""
    return Console(file=sys.stderr)
