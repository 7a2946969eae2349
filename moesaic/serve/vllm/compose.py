"""A compose file. Of several nodes each runs its own service of it: `HEAD=10.0.0.1 docker compose --profile node1 up`."""

from typing import Any

import yaml

from .base import IMAGE, Deployment, Renderer

MODELS = "/models"


def service(what: Deployment, rank: int) -> dict[str, Any]:
    """One node's server. Its processes pass tensors through the host's shared memory; its port stays on the host."""
    port, folder = what.flags["--port"], f"{MODELS}/{what.name}"
    words = what.words(folder, rank, "${HEAD:?the address of node 0}", dollar="$$")
    gpus = {"driver": "nvidia", "count": what.devices, "capabilities": ["gpu"]}
    source, target = (path.replace("$", "$$") for path in (str(what.model), folder))
    found: dict[str, Any] = {
        "image": IMAGE,
        "entrypoint": words[:2],
        "command": words[2:],
        "environment": {"VLLM_API_KEY": "${VLLM_API_KEY:-}"},
        "volumes": [{"type": "bind", "source": source, "target": target, "read_only": True}],
        "ipc": "host",
        "restart": "unless-stopped",
        "deploy": {"resources": {"reservations": {"devices": [gpus]}}},
    }
    if what.nodes > 1:
        found |= {"profiles": [f"node{rank}"], "network_mode": "host"}
    else:
        found["command"] = ["--host=0.0.0.0" if word.startswith("--host=") else word for word in words[2:]]
        found["ports"] = [f"127.0.0.1:{port}:{port}"]
    if rank == 0:
        found["healthcheck"] = {
            "test": ["CMD", "curl", "--fail", "--silent", f"http://127.0.0.1:{port}/health"],
            "interval": "30s",
            "timeout": "10s",
            "retries": 3,
            "start_period": f"{what.load_seconds}s",
        }
    return found


def render(what: Deployment) -> str:
    names = [what.slug if what.nodes == 1 else f"{what.slug}-node{rank}" for rank in range(what.nodes)]
    services = {name: service(what, rank) for rank, name in enumerate(names)}
    return yaml.safe_dump({"name": what.slug, "services": services}, sort_keys=False, width=120)


COMPOSE = Renderer("compose", render, "https://github.com/compose-spec/compose-spec")
