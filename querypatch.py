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
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from data.source_items import SourceKind

if TYPE_CHECKING:
    from pretrain.recipe import PretrainRecipe

app = typer.Typer(
    help="Pretrain a DETR transformer on unlabelled pictures in shards, resumed exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipe_app = typer.Typer(help="All the settings of a run, as YAML.", no_args_is_help=True)
shards_app = typer.Typer(help="Pictures in WebDataset tars with an index.", no_args_is_help=True)
show_app = typer.Typer(help="Draw what goes in and what comes out.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
app.add_typer(shards_app, name="shards")
app.add_typer(show_app, name="show")

RecipeName = Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Laid over the recipe.")
]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster; default: a local one.")]
Url = Annotated[str, typer.Argument(help="Folder: a path or any fsspec URL.")]


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    local: Local = False,
    address: Address = None,
) -> None:
    """Pretrain a detection transformer: needs run=FOLDER and data.shards=FOLDER."""
    with _one_line_errors():
        from cluster.preflight import check_new_run
        from pretrain.recipe import recipe_of

        settings = recipe_of(recipe, overrides or [])
        check_new_run(settings)
        _run(settings, local, address)


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


@recipe_app.command("list")
def recipe_list() -> None:
    """The recipes that come with querypatch, each with its first line."""
    from pretrain.recipe import shipped_recipes

    for name, text in shipped_recipes().items():
        typer.echo(f"{name:20} {text.splitlines()[0].removeprefix('# ')}")


@recipe_app.command("show")
def recipe_show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """A recipe with every value resolved; what only you can say is shown as null."""
    with _one_line_errors():
        from pretrain.recipe import shown_recipe

        typer.echo(shown_recipe(recipe, overrides or []), nl=False)


@recipe_app.command("schema")
def recipe_schema() -> None:
    """The JSON schema of recipes, for editors that complete and check YAML."""
    from pretrain.recipe import PretrainRecipe
    from training import recipe

    typer.echo(json.dumps(recipe.recipe_schema(PretrainRecipe), indent=1))


@shards_app.command("write")
def shards_write(
    source: Annotated[
        str, typer.Argument(help="Folder tree, list, tars, COCO json or VOC root; path or URL.")
    ],
    destination: Url,
    kind: Annotated[SourceKind | None, typer.Option(help="What SOURCE is.")] = None,
    pictures: Annotated[str | None, typer.Option(help="Folder of a COCO json's pictures.")] = None,
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


def main() -> None:
    """The `querypatch` command."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    app()


def _run(recipe: "PretrainRecipe", local: bool, address: str | None) -> None:
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
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("QUERYPATCH_TRACEBACK"):
            raise
        typer.secho(f"querypatch: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None


def _console() -> Console:
    return Console(file=sys.stderr)


if __name__ == "__main__":
    main()
