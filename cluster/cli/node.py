"""`querypatch node`: what a machine of a cluster says of itself; for manifests, not for people."""

from typing import Annotated, Literal

import typer

from cluster.cli.words import one_line_errors

node_app = typer.Typer(help="A node that goes tells its run.", no_args_is_help=True)

RayAddress = Annotated[str, typer.Option("--address", help="Of the cluster: host:port, or auto.")]


@node_app.command("drain")
def node_drain(
    deadline: Annotated[int, typer.Option(min=1, help="Seconds until this node ends.")],
    address: RayAddress = "auto",
    node_id: Annotated[str | None, typer.Option(help="Ray's id; default: this machine's.")] = None,
) -> None:
    """Tell Ray that this node ends, and wait: its runs store a checkpoint meanwhile."""
    with one_line_errors():
        from cluster.node import drain_node

        drain_node(deadline, address, node_id)


@node_app.command("watch")
def node_watch(
    cloud: Annotated[Literal["aws", "gcp"], typer.Argument(help="Whose spot machine this is.")],
    address: RayAddress = "auto",
    metadata: Annotated[
        str | None, typer.Option(help="URL of the machine's metadata; default: the cloud's.")
    ] = None,
) -> None:
    """Wait for the notice that this spot machine goes, then drain it."""
    with one_line_errors():
        from cluster.node import drain_node, wait_for_notice

        drain_node(wait_for_notice(cloud, metadata), address)
