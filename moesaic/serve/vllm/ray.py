"""A shell script that each node runs, for sites that have Ray: the followers join, the first node serves."""

from dataclasses import replace

from .base import Deployment, Renderer
from .command import shell

PORT = 6379


ALIVE = 'import ray; ray.init(address="auto"); print(sum(node["Alive"] for node in ray.nodes()))'


def render(what: Deployment) -> str:
    """vLLM takes the devices of the whole cluster, so the flags of its own launcher go."""
    serve = shell(replace(what, nodes=1), more="--distributed-executor-backend ray").replace("\n", "\n    ")
    return f"""#!/usr/bin/env bash
# on the first node: bash serve.sh head     on each other: bash serve.sh worker ADDRESS-OF-THE-FIRST
set -euo pipefail
case "${{1:?head or worker}}" in
  head)
    ray start --head --port={PORT} --num-gpus={what.devices}
    until [ "$(python3 -c '{ALIVE}' 2>/dev/null | tail -n 1)" = {what.nodes} ]; do sleep 5; done
    exec {serve}
    ;;
  worker)
    exec ray start --address="${{2:?address of the first node}}:{PORT}" --num-gpus={what.devices} --block
    ;;
  *)
    echo "serve.sh head | serve.sh worker ADDRESS" >&2
    exit 2
    ;;
esac
"""


RAY = Renderer("ray", render, "https://docs.ray.io/en/latest/cluster/cli.html")
