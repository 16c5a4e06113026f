"""Manifests: what Kubernetes and KubeRay would refuse is refused here, and what must hold for a run
that survives its nodes does.
"""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

import querypatch
from cluster.jobs.portable import PortableRecipe, portable_recipe
from cluster.render.k8s import Kind, render_k8s
from cluster.render.pods import USER
from cluster.render.settings import K8sSettings, RayUpSettings, keys_text
from training.recipe import RecipeError

PROJECT = Path(__file__).parents[2]
EXAMPLES = PROJECT / "cluster" / "k8s"
IMAGE = "registry.example.com/querypatch:0.1.0-cuda"
GIVEN = (
    "run=s3://bucket/runs/UP_DETR.1",
    "data.shards=s3://bucket/imagenet",
    "model.backbone.weights=s3://bucket/swav.pth",
    "resources.device=cuda",
)
Tree = dict[str, Any]


def recipe(*more: str, given: tuple[str, ...] = GIVEN) -> PortableRecipe:
    return portable_recipe("pretrain/imagenet_r50", [*given, *more], ["/scratch"])


def k8s(kind: Kind = "job", *more: str, **settings: Any) -> list[Tree]:
    text = render_k8s(recipe(*more), K8sSettings(image=IMAGE, **settings), kind)
    return list(yaml.safe_load_all(text))


def of_kind(documents: list[Tree], kind: str) -> Tree:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def ray_spec(documents: list[Tree]) -> Tree:
    main: Tree = documents[-1]["spec"]
    return main.get("rayClusterSpec", main)


def pods(documents: list[Tree]) -> Iterator[Tree]:
    spec = ray_spec(documents)
    yield spec["headGroupSpec"]["template"]
    yield from (group["template"] for group in spec["workerGroupSpecs"])
    if "submitterPodTemplate" in documents[-1]["spec"]:
        yield documents[-1]["spec"]["submitterPodTemplate"]


EVERYTHING: Tree = {
    "name": "a",
    "namespace": "training",
    "env_from": "object-store",
    "service_account": "trainer",
    "image_pull_secret": "registry",
    "volume_claim": "pictures",
    "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
    "priority_class": "low",
    "workers_per_node": 2,
}
VARIANTS: tuple[tuple[Kind, tuple[str, ...], Tree], ...] = (
    ("job", (), {}),
    ("job", ("resources.workers=2..8",), {"spot": "gke"}),
    ("job", ("resources.device=cpu",), {"spot": "eks", "queue": "q", "deadline_hours": 12}),
    ("job", (), {**EVERYTHING, "spot": "aks", "notice_s": 20, "retries": 0}),
    ("cluster", (), {}),
    ("cluster", ("resources.workers=1..4",), {"redis": "redis:6379", "redis_auth": "redis"}),
    ("cluster", (), EVERYTHING),
)


@pytest.mark.parametrize(("kind", "more", "settings"), VARIANTS)
def test_kuberay_s_schema_takes_every_variant(
    kind: Kind, more: tuple[str, ...], settings: Tree, shared_data: Path
) -> None:
    schema = kuberay_schema(str(shared_data))
    spec = k8s(kind, *more, **settings)[-1]["spec"]
    kept = schema["properties"]["rayClusterSpec"] if kind == "cluster" else schema
    assert faults(spec, kept) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [("rayClusterSpec.headGroupSpec.templates", {}), ("submissionMode", 3), ("entrypont", "x")],
)
def test_the_schema_sees_a_mistake(path: str, value: object, shared_data: Path) -> None:
    spec = k8s()[-1]["spec"]
    *sections, name = path.split(".")
    inner = spec
    for section in sections:
        inner = inner[section]
    inner[name] = value
    assert faults(spec, kuberay_schema(str(shared_data))) != []


def test_kubernetes_own_schemas_take_the_other_objects() -> None:
    documents = k8s(namespace="training")
    assert [document["kind"] for document in documents] == [
        *("ConfigMap", "PodDisruptionBudget", "PodDisruptionBudget", "NetworkPolicy", "RayJob"),
    ]
    for document in documents[:-1]:
        kubernetes_validate.validate(document, "1.34", strict=True)
    documents[1]["spec"]["minAvailble"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="minAvailble"):
        kubernetes_validate.validate(documents[1], "1.34", strict=True)


def test_a_job_may_be_begun_again_and_finds_its_recipe_and_its_secret() -> None:
    documents = k8s("job", "loop.epochs=3", env_from="object-store", namespace="training")
    job, stored = documents[-1], of_kind(documents, "ConfigMap")
    assert job["metadata"]["name"] == "up-detr-1"
    entrypoint = job["spec"]["entrypoint"].split()
    assert entrypoint[:2] == ["querypatch", "pretrain"]
    assert {"--continue", "--address"} <= set(entrypoint)
    head = ray_spec(documents)["headGroupSpec"]["template"]["spec"]
    (mount,) = [m for m in head["containers"][0]["volumeMounts"] if m["name"] == "recipe"]
    assert entrypoint[2] == f"{mount['mountPath']}/recipe.yaml"
    (volume,) = [v for v in head["volumes"] if v["name"] == "recipe"]
    assert volume["configMap"]["name"] == stored["metadata"]["name"]
    given = yaml.safe_load(stored["data"]["recipe.yaml"])
    assert (given["stage"], given["loop"]["epochs"]) == ("pretrain", 3)
    secrets = [pod["spec"]["containers"][0].get("envFrom") for pod in pods(documents)]
    assert secrets[:2] == [[{"secretRef": {"name": "object-store"}}]] * 2
    assert secrets[2] is None, "the submitter opens no storage"
    assert {document["metadata"]["namespace"] for document in documents} == {"training"}


def test_the_recipe_of_a_manifest_is_the_recipe_that_was_rendered(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe("optimiser.lr=1e-4").text)
    assert portable_recipe(str(file), []).recipe == recipe("optimiser.lr=1e-4").recipe


def test_the_command_in_the_manifest_is_one_of_the_front_door() -> None:
    words = k8s()[-1]["spec"]["entrypoint"].split()
    said = CliRunner().invoke(querypatch.app, [*words[1:2], "--help"], env={"COLUMNS": "200"})
    assert [word for word in words if word.startswith("--") and word not in said.output] == []
    stop = ray_spec(k8s())["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    command = stop["lifecycle"]["preStop"]["exec"]["command"]
    said = CliRunner().invoke(querypatch.app, [*command[1:3], "--help"], env={"COLUMNS": "200"})
    assert said.exit_code == 0
    assert command[3] in said.output


@pytest.mark.parametrize(
    ("workers", "per_node", "nodes"), [("3", 1, (3, 3)), ("2..8", 1, (2, 8)), ("3..8", 4, (1, 2))]
)
def test_nodes_follow_the_workers(workers: str, per_node: int, nodes: tuple[int, int]) -> None:
    documents = k8s("job", f"resources.workers={workers}", workers_per_node=per_node)
    spec = ray_spec(documents)
    (group,) = spec["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == nodes
    assert group["replicas"] == nodes[0], "a job waits for its first nodes: for no more than needed"
    assert spec.get("enableInTreeAutoscaling", False) == (nodes[0] < nodes[1])
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == str(per_node)
    assert limits["cpu"] == str(12 * per_node)


def test_a_cluster_that_stays_gives_back_nodes_that_nobody_needs() -> None:
    spec = ray_spec(k8s("cluster"))
    assert spec["workerGroupSpecs"][0]["minReplicas"] == 0
    assert spec["enableInTreeAutoscaling"]


def test_only_workers_go_to_spot_nodes_and_their_end_becomes_ray_s_drain() -> None:
    spec = ray_spec(k8s("job", spot="gke"))
    head = spec["headGroupSpec"]["template"]["spec"]
    worker = spec["workerGroupSpecs"][0]["template"]["spec"]
    assert "nodeSelector" not in head
    assert "tolerations" not in head
    assert worker["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert {each["key"] for each in worker["tolerations"]} >= {"cloud.google.com/gke-spot"}
    command = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["querypatch", "node", "drain", "--deadline", "12"]
    assert worker["terminationGracePeriodSeconds"] > int(command[-1])
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "no worker on the head"


def test_cpu_recipes_ask_for_no_gpu() -> None:
    worker = ray_spec(k8s("job", "resources.device=cpu"))["workerGroupSpecs"][0]["template"]["spec"]
    assert set(worker["containers"][0]["resources"]["limits"]) == {"cpu", "memory"}
    assert "tolerations" not in worker


@pytest.mark.parametrize("kind", ["job", "cluster"])
def test_pods_are_not_root_and_ports_want_the_token(kind: Kind) -> None:
    documents = k8s(kind, **EVERYTHING)
    assert ray_spec(documents)["authOptions"] == {"mode": "token"}
    for pod in pods(documents):
        rules = pod["spec"]["securityContext"]
        assert (rules["runAsNonRoot"], rules["runAsUser"]) == (True, USER)
        assert rules["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["image"] == IMAGE
        assert pod["spec"]["restartPolicy"] == "Never", "KubeRay refuses others with autoscaler v2"


def test_budgets_and_the_network_policy_select_the_pods_that_are_made() -> None:
    """Kubernetes takes whole numbers in minAvailable alone for pods of a custom resource."""
    documents = k8s("job", "resources.workers=2..8")
    labels = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for pod in pods(documents)
    }
    budgets = [document for document in documents if document["kind"] == "PodDisruptionBudget"]
    for part, budget in zip(("head", "worker"), budgets, strict=True):
        wanted = budget["spec"]["selector"]["matchLabels"]
        assert wanted.items() <= labels[part]["metadata"]["labels"].items()
        assert set(budget["spec"]) == {"minAvailable", "selector"}
    assert [budget["spec"]["minAvailable"] for budget in budgets] == [1, 2]
    policy = of_kind(documents, "NetworkPolicy")["spec"]
    wanted = policy["podSelector"]["matchLabels"]
    assert all(wanted.items() <= pod["metadata"]["labels"].items() for pod in pods(documents))
    assert policy["ingress"][0]["from"] == [{"podSelector": policy["podSelector"]}]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("data.shards=/home/me/shards", "data.shards=/home/me/shards is a path of this machine"),
        ("data.shards=shards", "shards is a path of this machine"),
        (
            "data.shards=s3://key:secret@bucket/x",
            "data.shards=s3://bucket/x was given with a password",
        ),
        ("resources.device=auto", "resources.device=auto"),
        (
            "init=https://host/w.pth?X-Amz-Signature=abc",
            "init=https://host/w.pth was given with a password",
        ),
    ],
)
def test_what_a_cluster_cannot_see_or_must_not_show_is_refused(more: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(complaint)) as raised:
        recipe(more)
    assert "secret@" not in str(raised.value)
    assert "abc" not in str(raised.value)


def test_paths_on_a_mounted_volume_are_taken() -> None:
    given = [*GIVEN, "data.shards=/data/shards"]
    assert portable_recipe("pretrain/imagenet_r50", given, ["/data"]).name == "up-detr-1"


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("s3://b/runs/A_b.7/", "a-b-7"),
        ("gs://b/2024", "run-2024"),
        ("s3://b/" + "x" * 60, "x" * 47),
    ],
)
def test_names_are_of_kubernetes_kind(run: str, name: str) -> None:
    found = recipe(f"run={run}").name
    assert found == name
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found)


@pytest.mark.parametrize(
    ("kind", "settings", "complaint"),
    [
        ("job", {"redis": "redis:6379"}, "redis: a job"),
        ("cluster", {"queue": "q"}, "queue: is of jobs"),
    ],
)
def test_settings_of_the_other_kind_are_refused(kind: Kind, settings: Tree, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        k8s(kind, **settings)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_the_examples_are_what_their_first_line_renders(file: Path, tmp_path: Path) -> None:
    command = shlex.split(file.read_text().splitlines()[0].removeprefix("# "))
    out = tmp_path / file.name
    done = CliRunner().invoke(querypatch.app, [*command[1:], "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert without_version(out.read_text()) == without_version(file.read_text())


def test_there_are_examples_of_each_kind() -> None:
    texts = [file.read_text() for file in EXAMPLES.glob("*.yaml")]
    for word in ("kind: RayJob", "kind: RayCluster", "type: aws", "type: gcp", "gke-spot"):
        assert any(word in text for text in texts)


def test_every_key_of_the_machines_is_told_with_its_sentence() -> None:
    for kind in (K8sSettings, RayUpSettings):
        lines = keys_text(kind).splitlines()
        assert [line.split()[0] for line in lines] == list(kind.model_fields)
        assert all(line.endswith(".") for line in lines)
    assert "image              must be said" in keys_text(K8sSettings)


def test_a_wrong_key_of_the_machines_is_one_line_with_the_nearest() -> None:
    words = [
        "render",
        "k8s",
        "pretrain/imagenet_r50",
        *GIVEN,
        "--with",
        "image=i",
        "--with",
        "spott=gke",
    ]
    done = CliRunner().invoke(querypatch.app, words)
    assert done.exit_code == 1
    assert "spott: unknown key; did you mean spot?" in done.output


def without_version(text: str) -> str:
    """Ray's is that of whoever renders."""
    return re.sub(r"rayVersion: .*", "", text)


def test_the_manifest_names_the_ray_of_this_installation() -> None:
    assert ray_spec(k8s())["rayVersion"] == version("ray")


@cache
def kuberay_schema(shared_data: str) -> Tree:
    """The schema of a RayJob's `spec`, with which unknown fields are mistakes."""
    files = sorted(Path(shared_data, "k8s").glob("ray.io_rayjobs-*.yaml"))
    if not files:
        pytest.skip("no k8s/ray.io_rayjobs-VERSION.yaml (KubeRay's CRD) in QUERYPATCH_DATA")
    definition: Tree = yaml.load(files[-1].read_text(), Loader=yaml.CSafeLoader)
    (stable,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    spec: Tree = stable["schema"]["openAPIV3Schema"]["properties"]["spec"]
    close(spec)
    return spec


def close(schema: object) -> None:
    """Kubernetes prunes unknown fields in silence; here they are mistakes."""
    if isinstance(schema, list):
        for each in schema:
            close(each)
    if not isinstance(schema, dict):
        return
    is_open = "additionalProperties" in schema or "x-kubernetes-preserve-unknown-fields" in schema
    if schema.get("type") == "object" and "properties" in schema and not is_open:
        schema["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    schema.pop("format", None) if isinstance(schema.get("format"), str) else None
    for value in list(schema.values()):
        close(value)


def faults(value: object, schema: Tree) -> list[str]:
    plain = json.loads(json.dumps(value))
    found = jsonschema.Draft7Validator(schema).iter_errors(plain)
    return [f"{'.'.join(map(str, each.absolute_path))}: {each.message[:200]}" for each in found]
