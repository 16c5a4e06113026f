"""`querypatch render k8s`: a recipe as objects of Kubernetes, for KubeRay 1.6 and later.

A RayJob makes a cluster, runs the recipe, and takes the cluster away; what it runs may be begun any
number of times and continues its run. A RayCluster stays, for `querypatch submit`. The pods are not
root, ports answer only to who has the token, secrets are named and never held.
"""

import json
from importlib.metadata import version
from typing import Literal

import yaml

from cluster.jobs.portable import PortableRecipe
from cluster.render.pods import (
    CONTAINER_SECURITY,
    RECIPE_FOLDER,
    Tree,
    head_pod,
    labels_of,
    submitter_pod,
    worker_pod,
)
from cluster.render.settings import K8sSettings
from training.recipe import RecipeError

Kind = Literal["job", "cluster"]


def render_k8s(recipe: PortableRecipe, settings: K8sSettings, kind: Kind = "job") -> str:
    """Manifests for `kubectl apply -f -`, in the order in which they are to be made.

    Raises RecipeError where the settings and the kind do not go together.
    """
    if kind == "job" and settings.redis is not None:
        raise RecipeError(
            "redis: a job's cluster ends with its job and keeps nothing; leave it out, or render "
            "--kind cluster"
        )
    if kind == "cluster" and settings.queue is not None:
        raise RecipeError("queue: is of jobs; leave it out, or render --kind job")
    name = settings.name or recipe.name
    documents = [_recipe_map(recipe, name), *_budgets(recipe, settings, name)]
    if settings.isolate:
        documents.append(_network_policy(name))
    documents.append(
        _job(recipe, settings, name) if kind == "job" else _cluster(recipe, settings, name)
    )
    if settings.namespace is not None:
        for document in documents:
            metadata = document["metadata"]
            assert isinstance(metadata, dict)
            metadata["namespace"] = settings.namespace
    return "---\n".join(_yaml(document) for document in documents)


def _job(recipe: PortableRecipe, settings: K8sSettings, name: str) -> Tree:
    labels = labels_of(name)
    if settings.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = settings.queue
    spec: Tree = {
        "entrypoint": (
            f"querypatch {recipe.stage} {RECIPE_FOLDER}/recipe.yaml --continue --address auto"
        ),
        "submissionMode": "K8sJobMode",
        # A new cluster each time; --continue goes on where the run is.
        "backoffLimit": settings.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "preRunningDeadlineSeconds": 3600,
    }
    if settings.queue is not None:
        spec["suspend"] = True
    if settings.deadline_hours is not None:
        spec["activeDeadlineSeconds"] = round(settings.deadline_hours * 3600)
    spec["submitterConfig"] = {"backoffLimit": 2}
    spec["submitterPodTemplate"] = submitter_pod(settings, name)
    spec["rayClusterSpec"] = _cluster_spec(
        recipe, settings, name, recipe.recipe.resources.min_workers
    )
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }


def _cluster(recipe: PortableRecipe, settings: K8sSettings, name: str) -> Tree:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "labels": labels_of(name)},
        "spec": _cluster_spec(recipe, settings, name, 0),
    }


def _cluster_spec(
    recipe: PortableRecipe, settings: K8sSettings, name: str, least_workers: int
) -> Tree:
    resources = recipe.recipe.resources
    least = _nodes(least_workers, settings)
    most = _nodes(resources.max_workers, settings)
    spec: Tree = {"rayVersion": version("ray"), "authOptions": {"mode": "token"}}
    if least < most:
        # A job begins with the fewest nodes; Ray asks for the others and takes what there is.
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 300,
            "securityContext": CONTAINER_SECURITY,
        }
    if settings.redis is not None:
        spec["gcsFaultToleranceOptions"] = _redis(settings.redis, settings.redis_auth)
    spec["headGroupSpec"] = {
        # No worker runs on the head: the run would end with it.
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": head_pod(settings, name),
    }
    uses_gpus = resources.device == "cuda"
    group: Tree = {
        "groupName": "spot" if settings.spot is not None else "workers",
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": worker_pod(settings, name, resources.cpus_per_worker, uses_gpus),
    }
    spec["workerGroupSpecs"] = [group]
    return spec


def _nodes(workers: int, settings: K8sSettings) -> int:
    return -(-workers // settings.workers_per_node)


def _redis(address: str, secret: str | None) -> Tree:
    options: Tree = {"redisAddress": address}
    if secret is not None:
        key = {"secretKeyRef": {"name": secret, "key": "password"}}
        options["redisPassword"] = {"valueFrom": key}
    return options


def _recipe_map(recipe: PortableRecipe, name: str) -> Tree:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-recipe", "labels": labels_of(name)},
        "data": {"recipe.yaml": recipe.text},
    }


def _budgets(recipe: PortableRecipe, settings: K8sSettings, name: str) -> list[Tree]:
    """What voluntary evictions must leave: the head, and as many nodes as the run needs.

    Whole numbers that must stay: Kubernetes takes nothing else for pods of a custom resource.
    """
    needed = {"head": 1, "worker": _nodes(recipe.recipe.resources.min_workers, settings)}
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"{name}-{part}", "labels": labels_of(name)},
            "spec": {"minAvailable": least, "selector": {"matchLabels": labels_of(name, part)}},
        }
        for part, least in needed.items()
    ]


def _network_policy(name: str) -> Tree:
    """Ports of our pods answer to our pods and to KubeRay's operator, wherever that runs."""
    operator = {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": labels_of(name)},
        "spec": {
            "podSelector": {"matchLabels": labels_of(name)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": labels_of(name)}}]},
                {
                    "from": [{"namespaceSelector": {}, "podSelector": operator}],
                    "ports": [{"port": 8265, "protocol": "TCP"}],
                },
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Block style without aliases; texts of several lines as blocks."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _yaml(document: Tree) -> str:
    # By way of JSON: nothing but plain values, as the API server gets them.
    plain = json.loads(json.dumps(document))
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
