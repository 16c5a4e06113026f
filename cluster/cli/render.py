"""`querypatch render`: a recipe as manifests for the machines that will run it."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.cli.words import Overrides, RecipeName, one_line_errors

render_app = typer.Typer(help="A recipe as files that start a cluster.", no_args_is_help=True)

With = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="KEY=VALUE", help="Of the machines; may be repeated."),
]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="File; default: standard output.")]


@render_app.command("k8s")
def render_for_k8s(
    recipe: RecipeName,
    overrides: Overrides = None,
    machines: With = None,
    kind: Annotated[
        Literal["job", "cluster"], typer.Option(help="A RayJob, or a RayCluster that stays.")
    ] = "job",
    out: Out = None,
) -> None:
    """Manifests of KubeRay: needs run=URL and --with image=IMAGE; all keys: `render keys k8s`."""
    with one_line_errors():
        from cluster.jobs.portable import portable_recipe
        from cluster.render.k8s import render_k8s
        from cluster.render.pods import SCRATCH, VOLUME
        from cluster.render.settings import K8sSettings
        from training.recipe import load_recipe

        settings = load_recipe(K8sSettings, {}, machines or [])
        folders = [SCRATCH, *([VOLUME] if settings.volume_claim else [])]
        text = render_k8s(portable_recipe(recipe, overrides or [], folders), settings, kind)
        command = ["k8s", recipe, *(overrides or []), "--kind", kind]
        _write(_header(command, machines) + text, out)


@render_app.command("ray-up")
def render_for_ray_up(
    provider: Annotated[Literal["aws", "gcp"], typer.Argument(help="Whose machines.")],
    recipe: RecipeName,
    overrides: Overrides = None,
    machines: With = None,
    out: Out = None,
) -> None:
    """A cluster file for `ray up`, as large as RECIPE asks; all keys: `render keys ray-up`."""
    with one_line_errors():
        from cluster.jobs.portable import portable_recipe
        from cluster.render.ray_up import render_ray_up
        from cluster.render.settings import RayUpSettings
        from training.recipe import load_recipe

        settings = load_recipe(RayUpSettings, {}, machines or [])
        text = render_ray_up(portable_recipe(recipe, overrides or []), provider, settings)
        command = ["ray-up", provider, recipe, *(overrides or [])]
        _write(_header(command, machines) + text, out)


@render_app.command("keys")
def render_keys(
    target: Annotated[Literal["k8s", "ray-up"], typer.Argument(help="For which command.")],
) -> None:
    """What --with can say, with the default and a sentence for each."""
    from cluster.render.settings import K8sSettings, RayUpSettings, keys_text

    typer.echo(keys_text(K8sSettings if target == "k8s" else RayUpSettings))


def _header(command: list[str], machines: list[str] | None) -> str:
    """The command that makes the file again."""
    told = [word for each in machines or [] for word in ("--with", each)]
    return f"# {shlex.join(['querypatch', 'render', *command, *told])}\n"


def _write(text: str, out: Path | None) -> None:
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text)
        typer.echo(f"wrote {out}")
