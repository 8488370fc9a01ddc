"""jobs/cluster and docs/cluster.md, as far as that goes without a cluster: what they say is well formed, agrees with the
project and with each other, and Ray's own launcher reads what it is to launch. `slurm.sh` is run by tests/test_slurm.py.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.cli import JOBS
from tests.kuberay import CLUSTER_SPEC, JOB_SPEC, a_kubernetes_object

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "jobs" / "cluster"
GUIDE = ROOT / "docs" / "cluster.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
IMAGE = f"registry.example.org/densebridge:{PROJECT['version']}"
UNITS = {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([a-zA-Z]*)", text).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


@pytest.mark.parametrize(
    ("name", "kind", "spec"), [("raycluster", "RayCluster", CLUSTER_SPEC), ("rayjob", "RayJob", JOB_SPEC)]
)
def test_kuberays_objects_are_well_formed(name: str, kind: str, spec: dict[str, Any]) -> None:
    """The part of KubeRay's API that is used. Held against the whole of it, the operator's own definitions of 1.5.1, 1.6.2 and
    1.7.0, by hand whenever this changes: they have two megabytes.
    """
    jsonschema.Draft202012Validator(a_kubernetes_object(kind, spec)).validate(read(f"{name}.yaml"))


def test_the_job_has_the_clusters_own_spec() -> None:
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"] == read("raycluster.yaml")["spec"]


def pods() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    spec = read("raycluster.yaml")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group, group["template"]["spec"]


def test_pods_are_given_what_they_ask_for_and_find_their_volumes() -> None:
    assert read("raycluster.yaml")["spec"]["rayVersion"] == PINNED["ray"]
    for group, pod in pods():
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        asked = container["resources"]
        assert asked["requests"] == asked["limits"] and quantity(asked["limits"]["cpu"]) >= 1
        memory, store = quantity(asked["limits"]["memory"]), quantity(group["rayStartParams"]["object-store-memory"])
        assert store < memory / 10
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert group.get("minReplicas", 0) <= group.get("maxReplicas", 0)
    claims = [v["persistentVolumeClaim"]["claimName"] for _, pod in pods() for v in pod["volumes"] if "secret" not in v]
    accounts = [pod["serviceAccountName"] for _, pod in pods()]
    before = {d["kind"]: d for d in yaml.safe_load_all((CLUSTER / "prerequisites.yaml").read_text())}
    assert {*claims} == {before["PersistentVolumeClaim"]["metadata"]["name"]}
    assert {*accounts} == {before["ServiceAccount"]["metadata"]["name"]}
    assert before["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_pools_are_what_stages_ask_for() -> None:
    """Only the GPU pool has GPUs, the head has no CPUs, spot taints are tolerated in both pools."""
    (head, head_pod), (download, download_pod), (gpu, gpu_pod) = pods()
    assert head["rayStartParams"]["num-cpus"] == "0" and "tolerations" not in head_pod
    limits = [pod["containers"][0]["resources"]["limits"] for pod in (head_pod, download_pod, gpu_pod)]
    assert ["nvidia.com/gpu" in each for each in limits] == [False, False, True]
    spot = {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "spot"}
    tolerated = [{t["key"] for t in pod["tolerations"]} for pod in (download_pod, gpu_pod)]
    assert tolerated == [spot, spot | {"nvidia.com/gpu"}]
    assert download["labels"] != gpu["labels"]
    (custom,) = shlex.split(gpu["rayStartParams"]["resources"])  # KubeRay writes it into a shell's command line
    assert json.loads(json.loads(custom) if custom.startswith('"') else custom) == {"captioner": 1}


def test_secrets_are_mounted_and_never_written_down() -> None:
    secretive = re.compile(r"(?i)(token|secret|password|_key)\b")
    for _, pod in pods():
        values = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
        (mount,) = (m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "secrets")
        assert Path(values.pop("DENSEBRIDGE_SECRETS")).parent == Path(mount["mountPath"]) and mount["readOnly"]
        assert not [name for name in values if secretive.search(name)]
    guide = GUIDE.read_text()
    assert "create secret generic densebridge-secrets --from-file=densebridge.env" in guide


def test_only_the_clusters_pods_and_the_operator_reach_them() -> None:
    (policy,) = (
        d for d in yaml.safe_load_all((CLUSTER / "prerequisites.yaml").read_text()) if d["kind"] == "NetworkPolicy"
    )
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    assert all(chosen.items() <= group["template"]["metadata"]["labels"].items() for group, _ in pods())
    own, operator = policy["spec"]["ingress"]
    assert own["from"] == [{"podSelector": {"matchLabels": chosen}}]
    (peer,) = operator["from"]
    assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    assert operator["ports"] == [{"port": 8265}] and read("rayjob.yaml")["spec"]["submissionMode"] == "HTTPMode"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, without comments, with continued lines joined."""
    lines = [line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps this top-level file or folder out: the last line that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and line.removeprefix("!") in ("*", path):
            out = not line.startswith("!")
    return out


def test_the_image_is_made_of_what_is_in_the_repository() -> None:
    found = instructions()
    assert {name for name, _ in found} <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    sources = [source for name, rest in found if name == "COPY" for source in rest.split()[:-1]]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    at_root = {line.split("/")[0] for line in tracked.splitlines()}
    assert {*sources} <= at_root and not [source for source in sources if ignored(source)] and ignored("tests")
    packages = {name.removesuffix("*") for name in _packages()}
    assert packages <= {*sources} and ("WORKDIR", "/opt/densebridge") in found


def _packages() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]


def test_the_image_has_the_projects_versions_and_no_rights() -> None:
    found = instructions()
    arguments = dict(rest.split("=", 1) for name, rest in found if name == "ARG")
    minor = re.fullmatch(r"python:(3\.\d+)-slim-\w+", arguments["BASE"])
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    assert minor and minor[1] in [f"3.{n}" for n in range(int(low), int(high))]
    assert {*arguments["EXTRAS"].split(",")} <= {*PROJECT["optional-dependencies"]}
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert all("--constraint constraints.txt" in rest or "--no-deps" in rest for rest in installs)
    users = [rest for name, rest in found if name == "USER"]
    assert users == ["1000"] and "--uid 1000" in found[2][1]
    assert not re.search(
        r"(?i)(token|secret|password|key)=\S", " ".join(rest for name, rest in found if name in ("ARG", "ENV"))
    )
    assert IMAGE in (CLUSTER / "Dockerfile").read_text() and PINNED["ray"] in PROJECT["dependencies"][5]


def test_ray_up_launches_it_as_told_and_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own checks and node provider on moto's EC2: machines, spot, roles and security groups are what the file says."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    with mock_aws():
        ec2, iam = boto3.resource("ec2"), boto3.client("iam")
        network = ec2.create_vpc(CidrBlock="10.0.0.0/16")
        subnet = network.create_subnet(CidrBlock="10.0.0.0/24", AvailabilityZone="us-west-2a")
        group = ec2.create_security_group(GroupName="own", Description="own", VpcId=network.id)
        image = boto3.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        config = prepare_config(read("aws.yaml"))
        validate_config(config)
        config["auth"]["ssh_private_key"] = str(tmp_path / "key.pem")  # or Ray writes one into the home folder
        for kind in config["available_node_types"].values():
            node = kind["node_config"]
            assert node["SubnetIds"] == ["subnet-0123"] and node["SecurityGroupIds"] == ["sg-0123"]
            profile = node["IamInstanceProfile"]["Arn"].split("/")[-1]
            known = [p["InstanceProfileName"] for p in iam.list_instance_profiles()["InstanceProfiles"]]
            if profile not in known:
                iam.create_instance_profile(InstanceProfileName=profile)
            arn = iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Arn"]
            node |= {"SubnetIds": [subnet.id], "SecurityGroupIds": [group.id], "ImageId": image, "KeyName": "none"}
            node["IamInstanceProfile"] = {"Arn": arn}
        config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, kind in config["available_node_types"].items():
            provider.create_node(kind["node_config"], {"ray-user-node-type": name, "ray-node-kind": "worker"}, 1)
        machines = {i.instance_type: i for i in ec2.instances.all()}
        rules = [rule for made in ec2.security_groups.all() for rule in made.ip_permissions]
    resources = {name: kind["resources"] for name, kind in config["available_node_types"].items()}
    assert resources["head"]["CPU"] == 0 and resources["cpu_spot"]["CPU"] == 16 and resources["gpu"]["GPU"] == 8
    spot = {
        name for name, kind in config["available_node_types"].items() if "InstanceMarketOptions" in kind["node_config"]
    }
    assert spot == {"cpu_spot"} and machines["m7i.4xlarge"].instance_lifecycle == "spot"
    assert rules == [] and all(m.public_ip_address is None for m in machines.values())
    roles = {kind: machine.iam_instance_profile["Arn"].split("/")[-1] for kind, machine in machines.items()}
    assert len(roles) == 3 and [kind for kind, role in roles.items() if role == "densebridge-head"] == ["m7i.xlarge"]


def test_ray_ups_nodes_have_the_image_and_ask_for_a_token() -> None:
    config = read("aws.yaml")
    started = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert started.count("RAY_AUTH_MODE=token ray start") == started.count("ray start") == 2
    assert "--dashboard-host=127.0.0.1" in started and config["provider"]["use_internal_ips"] is True
    home = dict(rest.split("=", 1) for rest in shlex.split(dict(instructions())["ENV"]))["HOME"]
    assert {Path(p).parts[:3] for p in config["file_mounts"]} == {Path(home).parts}
    assert f"{home}/.ray/auth_token" in config["file_mounts"] and config["docker"]["image"] == IMAGE
    least = sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())
    assert least <= config["max_workers"]


class Parsed(Exception):
    """Raised where a job would begin."""


def commands() -> list[str]:
    """Every `densebridge …` in docs/cluster.md and jobs/cluster, but for usage lines with words in capitals."""
    texts = {path.name: path.read_text() for path in (GUIDE, *CLUSTER.iterdir()) if path.is_file()}
    guide = "\n".join(re.findall(r"^```\n(.*?)^```", texts.pop(GUIDE.name), re.M | re.S)).replace("\\\n", " ")
    lines = re.findall(r"^ *(?:[A-Z_]+=\S+ )*densebridge (\w.*)$", guide, re.M)
    for text in texts.values():
        lines += re.findall(r"^(?:#|  # or.*:|  entrypoint:) +densebridge (\w.*)$", text, re.M)
        lines += re.findall(r"^# +sbatch.* jobs/cluster/slurm.sh (\w.*)$", text, re.M)
    lines += re.findall(r"^ *sbatch.* jobs/cluster/slurm.sh (\w.*)$", guide, re.M)
    return sorted({line.split("   #")[0].strip() for line in lines})


@pytest.mark.parametrize("line", commands())
def test_every_command_line_is_one(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSEBRIDGE_RUNS", "/data/runs")
    monkeypatch.setenv("DENSEBRIDGE_DATASET", "s3://bucket/dense")
    check_command(shlex.split(line), monkeypatch)


def check_command(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the command line as the job does, up to where it would begin; of `submit`, also the job's own."""
    job, own = argv[0], argv[1:]
    assert job in JOBS, argv
    module = importlib.import_module(f"jobs.{job}")
    reader = "parse" if hasattr(module, "parse") else "read_flags"
    real = getattr(module, reader)

    def read_to_the_end(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(module, reader, read_to_the_end)
        module.main(own)
    if job == "submit":
        flags = own[own.index("--") + 1 :] if "--" in own else []
        cluster = ["--address", "auto"] if own[0] in ("build", "train") else []
        check_command([*own[:2], *cluster, *flags], monkeypatch)


def test_there_are_commands_to_check() -> None:
    found = commands()
    assert len(found) > 8 and any(line.startswith("submit build") for line in found)
