"""`querypatch render ray-up`: a recipe's machines as a cluster file of `ray up`, for AWS and GCP.

The file names the token's file of this machine and holds no secret; the dashboard listens on the
head's loopback, which `ray dashboard FILE` reaches by ssh.
"""

from typing import Literal, assert_never

from cluster.jobs.portable import PortableRecipe
from cluster.render.settings import RayUpSettings
from training.recipe import RecipeError
from training.strict_yaml import dump_yaml

Provider = Literal["aws", "gcp"]
Tree = dict[str, object]

TOKEN_FILE = "~/.ray/auth_token"
"""Of Ray, on every machine; `ray get-auth-token --generate` makes it."""

GCP_MACHINE_IMAGE = "projects/deeplearning-platform-release/global/images/family/common-cpu"
"""The one of Ray's own examples."""


def render_ray_up(recipe: PortableRecipe, provider: Provider, settings: RayUpSettings) -> str:
    """The text of a cluster file for `ray up FILE`.

    Raises RecipeError where the provider needs a value that is not said, or the recipe a GPU.
    """
    _check(recipe, provider, settings)
    resources = recipe.recipe.resources
    least, most = (
        -(-workers // settings.workers_per_node)
        for workers in (resources.min_workers, resources.max_workers)
    )
    amounts = {"CPU": settings.worker_cpus, **({"GPU": settings.gpus} if settings.gpus else {})}
    environment = "RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"
    cluster: Tree = {
        "cluster_name": settings.name or recipe.name,
        "max_workers": most,
        "idle_timeout_minutes": settings.idle_minutes,
        "provider": _provider(provider, settings),
        "auth": {"ssh_user": settings.ssh_user},
        "docker": {
            "image": settings.image,
            "container_name": "querypatch",
            "pull_before_run": True,
            "run_options": [
                "--ulimit nofile=65536:65536",
                "--security-opt no-new-privileges",
                f"--shm-size={settings.shm_gib}g",
            ],
            "disable_shm_size_detection": True,
        },
        "available_node_types": {
            "head": {
                "resources": {"CPU": 0},
                "node_config": _machine(provider, settings, settings.head_machine, False),
            },
            "workers": {
                "min_workers": least,
                "max_workers": most,
                "resources": amounts,
                "node_config": _machine(provider, settings, settings.worker_machine, True),
            },
        },
        "head_node_type": "head",
        "file_mounts": {TOKEN_FILE: TOKEN_FILE},
        # Ray's defaults install Ray itself; the image has it.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            f"{environment} ray start --head --port=6379 --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{environment} ray start --address=$RAY_HEAD_IP:6379",
            *_watch(provider, settings),
        ],
    }
    return dump_yaml(cluster)


def _check(recipe: PortableRecipe, provider: Provider, settings: RayUpSettings) -> None:
    uses_gpus = recipe.recipe.resources.device == "cuda"
    if uses_gpus and settings.gpus < settings.workers_per_node:
        raise RecipeError(
            f"gpus={settings.gpus}: resources.device=cuda needs one for each of the "
            f"{settings.workers_per_node} workers of a node; say gpus= of worker_machine"
        )
    needed = recipe.recipe.resources.cpus_per_worker * settings.workers_per_node
    if settings.worker_cpus < needed:
        raise RecipeError(
            f"worker_cpus={settings.worker_cpus}: workers_per_node={settings.workers_per_node} of "
            f"resources.cpus_per_worker={recipe.recipe.resources.cpus_per_worker} need {needed}"
        )
    if provider == "gcp" and settings.project is None:
        raise RecipeError("project: Google Cloud needs the ID of yours; give project=ID")
    if provider == "gcp" and settings.gpus and settings.machine_image is None:
        raise RecipeError(
            "machine_image: GPUs need one with drivers and the NVIDIA container toolkit; give the "
            "path of an image or of a family of images"
        )


def _provider(provider: Provider, settings: RayUpSettings) -> Tree:
    place: Tree = {
        "type": provider,
        "region": settings.region,
        "availability_zone": settings.zone,
        # A machine that is not needed is given back, not stopped and paid for.
        "cache_stopped_nodes": False,
    }
    if provider == "gcp":
        place["project_id"] = settings.project
    return place


def _machine(provider: Provider, settings: RayUpSettings, kind: str, is_worker: bool) -> Tree:
    match provider:
        case "aws":
            return _aws_machine(settings, kind, is_worker)
        case "gcp":
            return _gcp_machine(settings, kind, is_worker)
        case _:
            assert_never(provider)


def _aws_machine(settings: RayUpSettings, kind: str, is_worker: bool) -> Tree:
    disk = {"VolumeSize": settings.disk_gb, "VolumeType": "gp3", "Encrypted": True}
    machine: Tree = {
        "InstanceType": kind,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        # Metadata, and the rights of the machine, answer only to requests with a session's token.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if settings.machine_image is not None:
        machine["ImageId"] = settings.machine_image
    if settings.identity is not None:
        machine["IamInstanceProfile"] = {"Arn": settings.identity}
    if is_worker and settings.spot:
        machine["InstanceMarketOptions"] = {"MarketType": "spot"}
    return machine


def _gcp_machine(settings: RayUpSettings, kind: str, is_worker: bool) -> Tree:
    image = settings.machine_image or GCP_MACHINE_IMAGE
    disk = {"diskSizeGb": settings.disk_gb, "sourceImage": image}
    machine: Tree = {
        "machineType": kind,
        "disks": [
            {"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}
        ],
    }
    if settings.identity is not None:
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        machine["serviceAccounts"] = [{"email": settings.identity, "scopes": scopes}]
    scheduling: Tree = {}
    if is_worker and settings.spot:
        scheduling["preemptible"] = True
    if is_worker and settings.gpu_type is not None:
        place = f"projects/{settings.project}/zones/{settings.zone.partition(',')[0]}"
        kind_of_gpu = f"{place}/acceleratorTypes/{settings.gpu_type}"
        machine["guestAccelerators"] = [
            {"acceleratorType": kind_of_gpu, "acceleratorCount": settings.gpus}
        ]
    if is_worker and settings.gpus:
        scheduling["onHostMaintenance"] = "TERMINATE"
    if scheduling:
        # A list of one, as in Ray's own defaults for this provider.
        machine["scheduling"] = [scheduling]
    return machine


def _watch(provider: Provider, settings: RayUpSettings) -> list[str]:
    """A spot machine's notice becomes Ray's, and that a checkpoint."""
    if not settings.spot:
        return []
    log = "/tmp/querypatch-notice.log"
    return [f"RAY_AUTH_MODE=token nohup querypatch node watch {provider} > {log} 2>&1 &"]
