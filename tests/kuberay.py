"""The part of KubeRay's v1 API that jobs/cluster uses, as JSON schemas in which no other key may stand."""

from __future__ import annotations

from typing import Any


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """The schema of an object that has no other keys."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": TEXT}
RESOURCES = closed({"requests": TEXTS, "limits": TEXTS}, "requests", "limits")
CONTAINER_SECURITY = closed(
    {"allowPrivilegeEscalation": {"const": False}, "capabilities": {"const": {"drop": ["ALL"]}}},
    "allowPrivilegeEscalation",
    "capabilities",
)
CONTAINER = closed(
    {
        "name": TEXT,
        "image": TEXT,
        "env": listed(closed({"name": TEXT, "value": TEXT}, "name", "value")),
        "ports": listed(closed({"name": TEXT, "containerPort": COUNT}, "name", "containerPort")),
        "resources": RESOURCES,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": listed(
            closed({"name": TEXT, "mountPath": TEXT, "readOnly": {"const": True}}, "name", "mountPath")
        ),
    },
    *("name", "image", "env", "resources", "securityContext", "volumeMounts"),
)
VOLUME = closed(
    {
        "name": TEXT,
        "persistentVolumeClaim": closed({"claimName": TEXT}, "claimName"),
        "secret": closed({"secretName": TEXT, "defaultMode": {"const": 0o440}}, "secretName", "defaultMode"),
    },
    "name",
)
TOLERATION = closed(
    {"key": TEXT, "operator": {"enum": ["Exists", "Equal"]}, "value": TEXT, "effect": {"const": "NoSchedule"}},
    *("key", "operator", "effect"),
)
POD_SECURITY = closed(
    {
        "runAsNonRoot": {"const": True},
        "runAsUser": {"const": 1000},
        "fsGroup": {"const": 1000},
        "fsGroupChangePolicy": {"const": "OnRootMismatch"},
        "seccompProfile": {"const": {"type": "RuntimeDefault"}},
    },
    *("runAsNonRoot", "runAsUser", "fsGroup"),
)
POD = closed(
    {
        "metadata": closed({"labels": TEXTS, "annotations": TEXTS}, "labels"),
        "spec": closed(
            {
                "serviceAccountName": TEXT,
                "automountServiceAccountToken": {"const": False},
                "securityContext": POD_SECURITY,
                "tolerations": listed(TOLERATION),
                "containers": {**listed(CONTAINER), "maxItems": 1},
                "volumes": listed(VOLUME),
            },
            *("serviceAccountName", "securityContext", "containers", "volumes"),
        ),
    },
    *("metadata", "spec"),
)
POOL = closed(
    {
        "groupName": TEXT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "labels": TEXTS,
        "rayStartParams": TEXTS,
        "template": POD,
    },
    *("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
)
CLUSTER_SPEC = closed(
    {
        "rayVersion": TEXT,
        "authOptions": {"const": {"mode": "token"}},
        "enableInTreeAutoscaling": {"const": True},
        "autoscalerOptions": closed(
            {
                "version": {"const": "v2"},
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "idleTimeoutSeconds": COUNT,
                "resources": RESOURCES,
                "securityContext": CONTAINER_SECURITY,
            },
        ),
        "headGroupSpec": closed(
            {"serviceType": {"const": "ClusterIP"}, "rayStartParams": TEXTS, "template": POD},
            *("serviceType", "rayStartParams", "template"),
        ),
        "workerGroupSpecs": listed(POOL),
    },
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"),
)
JOB_SPEC = closed(
    {
        "entrypoint": TEXT,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
        "backoffLimit": COUNT,
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "shutdownAfterJobFinishes": {"const": True},
        "ttlSecondsAfterFinished": COUNT,
        "rayClusterSpec": CLUSTER_SPEC,
    },
    *("entrypoint", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes", "rayClusterSpec"),
)


def a_kubernetes_object(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    head = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": closed({"name": TEXT}, "name")}
    return closed({**head, "spec": spec}, *head, "spec")
