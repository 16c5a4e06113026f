"""What a recipe does not say of the machines of a cluster: settings of `querypatch render`."""

import json
from typing import Literal, Self

from pydantic import Field, model_validator

from models.settings import Settings

SpotProvider = Literal["gke", "eks", "aks"]
CloudProvider = Literal["aws", "gcp"]

NOTICE_S: dict[SpotProvider, int] = {"gke": 12, "eks": 110, "aks": 25}
"""Seconds that a pod has before its spot node ends, less what it takes to hear it: GKE gives pods
the first 15 of 30 (node pools of GKE 1.35 can be set to 120), AKS tells 30 before, EKS 120 before.
"""


def keys_text(kind: type[Settings]) -> str:
    """A line for each key: its default, or that it must be said, and its sentence."""
    lines = []
    for name, field in kind.model_fields.items():
        default = json.dumps(field.get_default(call_default_factory=True), default=str)
        value = "must be said" if field.is_required() else default
        sentence = " ".join((field.description or "").split())
        lines.append(f"{name:18} {value:14} {sentence}")
    return "\n".join(lines)


class NodeSettings(Settings):
    """One node of workers."""

    workers_per_node: int = Field(default=1, ge=1)
    """Training processes on one node; each has a GPU of its own where the recipe trains on them."""
    memory_gib: int = Field(default=16, ge=1)
    """Memory of one worker with its loader processes."""
    shm_gib: int = Field(default=4, ge=1)
    """Shared memory of a node, through which loader processes hand over their batches."""


class K8sSettings(NodeSettings):
    """Pods of a Ray cluster on Kubernetes."""

    image: str
    """Image of all pods: one of docker/, in a registry that the nodes reach."""
    name: str | None = Field(default=None, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)
    """Name of the job or cluster; null makes it of the last part of the run's URL."""
    namespace: str | None = None
    """Namespace of everything; null leaves it to kubectl."""
    env_from: str | None = None
    """Secret whose keys become environment variables, e.g. AWS_ACCESS_KEY_ID; null for none."""
    service_account: str | None = None
    """Service account of the pods, where the cloud gives rights on its storage to one."""
    image_pull_secret: str | None = None
    """Secret that opens the registry of the image; null for an open one."""
    volume_claim: str | None = None
    """PersistentVolumeClaim that all pods see as /data; null where everything is on URLs."""
    scratch_gib: int = Field(default=100, ge=1)
    """Disk of a pod for checkpoints on their way, and for caches under /scratch."""
    head_cpus: int = Field(default=2, ge=1)
    """CPU cores of the head, where the driver of the run is."""
    head_memory_gib: int = Field(default=8, ge=1)
    """Memory of the head."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name by which nodes offer their GPUs."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that workers may run on, e.g. of a type of GPU."""
    spot: SpotProvider | None = None
    """Take spot nodes of this provider for the workers, never for the head; null for others."""
    notice_s: int | None = Field(default=None, ge=5)
    """Seconds that a leaving node gives its workers for a checkpoint; null: the provider's."""
    priority_class: str | None = None
    """PriorityClass of the pods."""
    queue: str | None = None
    """LocalQueue of Kueue that admits the job; null starts it at once."""
    retries: int = Field(default=3, ge=0)
    """Times that a failed job is begun again on a new cluster, where it continues its run."""
    deadline_hours: float | None = Field(default=None, gt=0)
    """Hours after which the job is ended; null for none."""
    redis: str | None = None
    """host:port of a Redis in which the head keeps its state, so that a new head finds the jobs;
    of clusters alone.
    """
    redis_auth: str | None = None
    """Secret with the key `password` of that Redis."""
    isolate: bool = True
    """Let only the cluster's own pods and KubeRay's operator reach its ports (a NetworkPolicy)."""

    @property
    def notice(self) -> int:
        """Seconds that the end of a node is known before."""
        if self.notice_s is not None:
            return self.notice_s
        return NOTICE_S[self.spot] if self.spot is not None else 60

    @model_validator(mode="after")
    def _redis_with_its_auth(self) -> Self:
        if self.redis_auth is not None and self.redis is None:
            raise ValueError(f"redis_auth={self.redis_auth} is of no use without redis=HOST:PORT")
        return self


class RayUpSettings(NodeSettings):
    """Virtual machines of a Ray cluster that `ray up` starts."""

    image: str
    """Container image of all nodes: one of docker/, in a registry that the machines reach."""
    name: str | None = Field(default=None, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)
    """Name of the cluster; null makes it of the last part of the run's URL."""
    region: str
    """Region of the provider, e.g. eu-central-1 or europe-west4."""
    zone: str
    """Zones of that region, with commas between them."""
    project: str | None = None
    """Project of Google Cloud."""
    head_machine: str
    """Machine type of the head, e.g. m7i.large or n2-standard-4."""
    worker_machine: str
    """Machine type of a worker's node, e.g. g6.2xlarge or g2-standard-8."""
    worker_cpus: int = Field(default=8, ge=1)
    """CPU cores of that type."""
    gpu_type: str | None = None
    """Google Cloud: accelerator of a node, e.g. nvidia-l4, where the machine type has none."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of a node."""
    machine_image: str | None = None
    """Disk image of the machines, with docker and, for GPUs, the NVIDIA container toolkit; null
    takes Ray's default on AWS, and on Google Cloud its image without GPUs.
    """
    identity: str | None = None
    """AWS: ARN of an instance profile; Google Cloud: e-mail of a service account; with rights on
    the storage.
    """
    disk_gb: int = Field(default=200, ge=20)
    """Disk of a node, in 10^9 bytes."""
    spot: bool = True
    """Take spot machines for the workers, never for the head."""
    ssh_user: str = "ubuntu"
    """Who logs in to the machines."""
    idle_minutes: int = Field(default=10, ge=1)
    """Minutes without work after which a node of workers is given back."""
