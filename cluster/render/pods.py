"""Pods of a Ray cluster on Kubernetes: who they are, what they may, what they see."""

from collections.abc import Mapping
from typing import assert_never

from cluster.render.settings import K8sSettings, SpotProvider

Tree = dict[str, object]
"""A part of a manifest."""

RECIPE_FOLDER = "/etc/querypatch"
"""Where the head finds `recipe.yaml`."""

SCRATCH, VOLUME = "/scratch", "/data"

USER = 1000
"""The user of docker/Dockerfile, who is not root; a test holds the two together."""

CONTAINER_SECURITY: Tree = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}


def labels_of(name: str, part: str | None = None) -> dict[str, str]:
    """Labels by which our own objects find our pods; Ray's names end in letters made by chance."""
    own = {"app.kubernetes.io/instance": name, "app.kubernetes.io/part-of": "querypatch"}
    return own if part is None else {**own, "app.kubernetes.io/component": part}


def head_pod(settings: K8sSettings, name: str) -> Tree:
    """The pod of Ray's head and of the run's driver; on a node that stays."""
    amounts = {"cpu": str(settings.head_cpus), "memory": f"{settings.head_memory_gib}Gi"}
    container = _container("ray-head", settings, amounts)
    container["ports"] = [
        {"containerPort": 6379, "name": "gcs-server"},
        {"containerPort": 8265, "name": "dashboard"},
        {"containerPort": 8080, "name": "metrics"},
    ]
    _mount(container, "recipe", RECIPE_FOLDER, read_only=True)
    volumes: list[Tree] = [*_volumes(settings)]
    volumes.append({"name": "recipe", "configMap": {"name": f"{name}-recipe"}})
    return _template(settings, labels_of(name, "head"), container, volumes)


def worker_pod(settings: K8sSettings, name: str, cpus_per_worker: int, uses_gpus: bool) -> Tree:
    """The pod of one node of workers.

    Before it ends it tells Ray so (`preStop`): Ray tells the run, which stores a checkpoint.
    """
    count = settings.workers_per_node
    amounts = {"cpu": str(cpus_per_worker * count), "memory": f"{settings.memory_gib * count}Gi"}
    if uses_gpus:
        amounts[settings.gpu_resource] = str(count)
    container = _container("ray-worker", settings, amounts)
    drain = ["querypatch", "node", "drain", "--deadline", str(settings.notice)]
    container["lifecycle"] = {"preStop": {"exec": {"command": drain}}}
    shared: Tree = {"medium": "Memory", "sizeLimit": f"{settings.shm_gib}Gi"}
    _mount(container, "shm", "/dev/shm")
    volumes: list[Tree] = [*_volumes(settings), {"name": "shm", "emptyDir": shared}]
    template = _template(settings, labels_of(name, "worker"), container, volumes)
    pod = template["spec"]
    assert isinstance(pod, dict)
    # What is left after the notice: Ray's own end.
    pod["terminationGracePeriodSeconds"] = settings.notice + 10
    pod["automountServiceAccountToken"] = False
    if selector := {**settings.node_selector, **_spot_labels(settings.spot)}:
        pod["nodeSelector"] = selector
    if tolerations := _tolerations(settings, uses_gpus):
        pod["tolerations"] = tolerations
    return template


def submitter_pod(settings: K8sSettings, name: str) -> Tree:
    """The pod that hands the job to the head and shows its log."""
    amounts = {"cpu": "500m", "memory": "512Mi"}
    container = _container("ray-job-submitter", settings, amounts, has_scratch=False)
    container.pop("envFrom", None)
    template = _template(settings, labels_of(name, "submitter"), container, [])
    pod = template["spec"]
    assert isinstance(pod, dict)
    pod["automountServiceAccountToken"] = False
    return template


def _template(
    settings: K8sSettings, labels: Mapping[str, str], container: Tree, volumes: list[Tree]
) -> Tree:
    pod: Tree = {
        # Ray's autoscaler and KubeRay make a new pod where one has ended.
        "restartPolicy": "Never",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if settings.service_account is not None:
        pod["serviceAccountName"] = settings.service_account
    if settings.priority_class is not None:
        pod["priorityClassName"] = settings.priority_class
    if settings.image_pull_secret is not None:
        pod["imagePullSecrets"] = [{"name": settings.image_pull_secret}]
    pod["containers"] = [container]
    if volumes:
        pod["volumes"] = volumes
    return {"metadata": {"labels": dict(labels)}, "spec": pod}


def _container(
    name: str, settings: K8sSettings, amounts: dict[str, str], has_scratch: bool = True
) -> Tree:
    container: Tree = {
        "name": name,
        "image": settings.image,
        "resources": {"limits": dict(amounts), "requests": dict(amounts)},
        "securityContext": CONTAINER_SECURITY,
    }
    if has_scratch:
        container["env"] = [
            {"name": "TMPDIR", "value": SCRATCH},
            # Where Ray's autoscaler looks for the head's logs; Ray would follow TMPDIR.
            {"name": "RAY_TMPDIR", "value": "/tmp"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        ]
        _mount(container, "scratch", SCRATCH)
        if settings.volume_claim is not None:
            _mount(container, "data", VOLUME)
    if settings.env_from is not None:
        container["envFrom"] = [{"secretRef": {"name": settings.env_from}}]
    return container


def _mount(container: Tree, name: str, path: str, read_only: bool = False) -> None:
    mounts = container.setdefault("volumeMounts", [])
    assert isinstance(mounts, list)
    mounts.append({"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})})


def _volumes(settings: K8sSettings) -> list[Tree]:
    scratch: Tree = {"name": "scratch", "emptyDir": {"sizeLimit": f"{settings.scratch_gib}Gi"}}
    if settings.volume_claim is None:
        return [scratch]
    claim: Tree = {"name": "data", "persistentVolumeClaim": {"claimName": settings.volume_claim}}
    return [scratch, claim]


def _spot_labels(provider: SpotProvider | None) -> dict[str, str]:
    match provider:
        case None:
            return {}
        case "gke":
            return {"cloud.google.com/gke-spot": "true"}
        case "eks":
            return {"eks.amazonaws.com/capacityType": "SPOT"}
        case "aks":
            return {"kubernetes.azure.com/scalesetpriority": "spot"}
        case _:
            assert_never(provider)


def _tolerations(settings: K8sSettings, uses_gpus: bool) -> list[Tree]:
    """Of what keeps other pods off spot nodes (AKS by default, GKE where asked) and off GPUs."""
    keys = list(_spot_labels(settings.spot)) + ([settings.gpu_resource] if uses_gpus else [])
    return [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]
