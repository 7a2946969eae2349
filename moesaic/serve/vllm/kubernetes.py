"""A LeaderWorkerSet, whose group is one server however many nodes it spans, and a Service before its leader.

The model lies on a volume claim named `models`. Probes are the leader's, as followers answer no HTTP; a start
may take as long as a slow volume needs to be read. A pod that dies takes its group along. A secret
`NAME-api-key`, where there is one, holds the key that clients must send.
"""

from typing import Any

import yaml

from .base import IMAGE, Deployment, Renderer

MODELS = "/models"
PERIOD_SECONDS = 10
LEADER = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}


def probe(port: int, period: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/health", "port": port},
        "periodSeconds": period, "timeoutSeconds": 10, "failureThreshold": failures,
    }  # fmt: skip


def template(what: Deployment, leads: bool) -> dict[str, Any]:
    """A pod of the group. The set tells each its index and the leader's address."""
    words = what.words(f"{MODELS}/{what.name}", 0 if leads else 1, "$(LWS_LEADER_ADDRESS)", dollar="$$")
    changed = {"--host": "--host=0.0.0.0", "--node-rank": "--node-rank=$(LWS_WORKER_INDEX)"}
    port = int(str(what.flags["--port"]))
    secret = {"name": f"{what.slug}-api-key", "key": "key", "optional": True}
    container: dict[str, Any] = {
        "name": "vllm",
        "image": IMAGE,
        "command": words[:2],
        "args": [changed.get(word.split("=")[0], word) for word in words[2:]],
        "env": [{"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": secret}}],
        "resources": {"limits": {"nvidia.com/gpu": str(what.devices)}},
        "volumeMounts": [
            {"name": "models", "mountPath": MODELS, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if leads:
        container |= {
            "ports": [{"name": "http", "containerPort": port}],
            "startupProbe": probe(port, PERIOD_SECONDS, -(-what.load_seconds // PERIOD_SECONDS)),
            "readinessProbe": probe(port, PERIOD_SECONDS, 3),
            "livenessProbe": probe(port, 30, 10),
        }
    volumes = [
        {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
    ]
    spec = {"terminationGracePeriodSeconds": 120, "containers": [container], "volumes": volumes}
    return {"metadata": {"labels": {"app": what.slug}}, "spec": spec}


def render(what: Deployment) -> str:
    port = int(str(what.flags["--port"]))
    group: dict[str, Any] = {"size": what.nodes, "restartPolicy": "RecreateGroupOnPodRestart"}
    if what.nodes > 1:
        group["leaderTemplate"] = template(what, leads=True)
    group["workerTemplate"] = template(what, leads=what.nodes == 1)
    workload = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": what.slug},
        "spec": {"replicas": 1, "leaderWorkerTemplate": group},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": what.slug},
        "spec": {
            "selector": {"leaderworkerset.sigs.k8s.io/name": what.slug, **LEADER},
            "ports": [{"name": "http", "port": port, "targetPort": "http"}],
        },
    }
    return yaml.safe_dump_all([workload, service], sort_keys=False, width=120)


KUBERNETES = Renderer("kubernetes", render, "https://lws.sigs.k8s.io")
