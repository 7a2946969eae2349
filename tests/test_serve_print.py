"""Deployments written down: what fit counted on is what the flags say, in every way of writing; shells and YAML agree.

vLLM's own parser reads the flags in tests/engines/test_vllm_fit.py.
"""

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from moesaic.checkpoint import Checkpoint
from moesaic.errors import InputError
from moesaic.fit import Machine, fit
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.serve.vllm import RENDERERS, Deployment, deployment, render

CONFIGS = Path(__file__).parent / "configs"
NAMES = ("MiniMax-M3-64e", 'it\'s a "model" $HOME $(id) `id` #1')
CASES = [
    ("m2.7", "4xH100", {}),
    ("m2.7", "8xH200", {"kv": "fp8", "context": 4096, "concurrency": 300}),
    ("m3_mxfp8", "8xH100", {"kv": "fp8"}),
    ("m3", "16xH100", {}),
    ("m2.7 in mxfp4", "2xDGX Spark", {}),
]


def opened(name: str, folder: Path) -> Checkpoint:
    """A released model, or what a plan makes of it, as a bare config."""
    folder.mkdir(parents=True)
    source, _, format = name.partition(" in ")
    shutil.copy(CONFIGS / f"{source}.json", folder / "config.json")
    found = Checkpoint.open(folder)
    if format:
        units = (unit for unit, members in found.architecture.units.items() if members[0].role == "experts")
        blueprint = Blueprint.of(found, Plan("compressed_tensors", formats=dict.fromkeys(units, format)))
        (folder / "config.json").write_text(json.dumps(blueprint.config))
    return Checkpoint.open(folder)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {case[1]}")
def case(request, tmp_path_factory):
    """An export, the facts of its fit, and how vLLM serves it."""
    name, devices, question = request.param
    export = opened(name, tmp_path_factory.mktemp("case") / NAMES[0])
    facts = fit(export, Machine.parse(devices), **question)
    return export, facts, deployment(export, facts)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory) -> Deployment:
    """A name that no shell and no YAML should ever see bare."""
    export = opened("m3", tmp_path_factory.mktemp("hostile") / NAMES[1])
    return deployment(export, fit(export, Machine.parse("16xH100")))


def test_flags_say_what_fit_counted_on(case):
    export, facts, found = case
    flags = found.flags
    assert flags["--tensor-parallel-size"] == facts["layout"]["devices"] == found.nodes * found.devices
    assert ("--enable-expert-parallel" in flags) == facts["layout"]["expert_parallel"]
    assert flags["--gpu-memory-utilization"] == facts["machine"]["utilization"]
    assert flags["--kv-cache-dtype"] == {"bf16": "auto", "fp8": "fp8"}[facts["kv"]]
    assert facts["context"] <= flags["--max-model-len"] <= export.architecture.context
    assert flags["--max-model-len"] in (facts["context"], facts["cache"]["longest_context"]["low"])
    operands = next(line["formula"] for line in facts["explain"] if line["name"] == "activations")
    assert operands.startswith(f"{flags['--max-num-batched-tokens']:,} tokens")
    assert f"{flags['--max-num-seqs']} sequences" in operands


def test_flags_of_a_family(case):
    """Block size and backend of M3's sparse attention; parsers that are the family's."""
    export, _, found = case
    sparse = export.family.name == "minimax_m3_vl"
    word = "minimax_m3" if sparse else "minimax_m2"
    assert found.flags["--tool-call-parser"] == found.flags["--reasoning-parser"] == word
    assert "--enable-auto-tool-choice" in found.flags
    assert (found.flags.get("--block-size"), found.flags.get("--attention-backend")) == (
        (128, "TRITON_ATTN") if sparse else (None, None)
    )


def ran(script: str, *arguments: str, path: Path | None = None) -> list[str]:
    """What a shell hands to `vllm`: a word each."""
    function = "" if path else 'vllm() { printf "%s\\0" vllm "$@"; }\n'
    environment = {"PATH": f"{path}:/usr/bin:/bin"} if path else None
    done = subprocess.run(
        ["bash", "-c", function + script, "serve.sh", *arguments], capture_output=True, check=True, env=environment
    )
    return done.stdout.decode().split("\0")[:-1]


def spread(words: list[str]) -> list[str]:
    """`--flag=value` as `--flag value`."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]


def test_the_command_reaches_vllm_word_for_word(case):
    export, _, found = case
    commands = ran(render(found, "command"))
    if found.nodes == 1:
        assert commands == spread(found.words(str(export.path)))


def test_hostile_names_reach_vllm_word_for_word(two_nodes):
    words = ran(render(two_nodes, "command"))
    wanted = [spread(two_nodes.words(str(two_nodes.model), rank, "10.0.0.1")) for rank in (0, 1)]
    assert words == wanted[0] + wanted[1]
    assert ("--headless" in wanted[0], "--headless" in wanted[1]) == (False, True)


def test_every_way_says_the_same(case):
    """Flags in all four, but for the address to listen on and the launcher's own."""
    _, _, found = case
    own = {
        "--host",
        "--nnodes",
        "--node-rank",
        "--master-addr",
        "--master-port",
        "--headless",
        "--distributed-executor-backend",
    }
    wanted = {flag: "" if value is None else str(value) for flag, value in found.flags.items() if flag not in own}

    def said(words: list[str]) -> dict[str, str]:
        flags = dict(((*word.split("=", 1), "")[:2]) for word in words if word.startswith("--"))
        return {flag: value for flag, value in flags.items() if flag not in own}

    services = yaml.safe_load(render(found, "compose"))["services"].values()
    workload, _ = yaml.safe_load_all(render(found, "kubernetes"))
    group = workload["spec"]["leaderWorkerTemplate"]
    templates = [group[key] for key in ("leaderTemplate", "workerTemplate") if key in group]
    pods = [template["spec"]["containers"][0] for template in templates]
    assert len(services) == found.nodes == group["size"] and len(pods) == min(2, found.nodes)
    for words in [service["command"] for service in services] + [pod["args"] for pod in pods]:
        assert said(words) == wanted
    for flag, value in wanted.items():
        assert f"{flag} {value}".rstrip() in render(found, "ray").replace("'", "")


def test_compose(case):
    """Loopback alone; the GPUs of one node; a start that may last as long as the load."""
    _, facts, found = case
    services = list(yaml.safe_load(render(found, "compose"))["services"].values())
    for rank, service in enumerate(services):
        [gpus] = service["deploy"]["resources"]["reservations"]["devices"]
        assert (gpus["driver"], gpus["count"]) == ("nvidia", found.devices)
        [volume] = service["volumes"]
        assert (
            volume["source"] == str(found.model) and volume["target"] == service["command"][0] and volume["read_only"]
        )
        if found.nodes == 1:
            assert service["ports"] == ["127.0.0.1:8000:8000"]
        else:  # on the host's own network
            assert "--host=127.0.0.1" in service["command"] and service["profiles"] == [f"node{rank}"]
            assert f"--node-rank={rank}" in service["command"]
    assert int(services[0]["healthcheck"]["start_period"].rstrip("s")) >= facts["disk_bytes"] / 200e6
    assert not any("healthcheck" in service for service in services[1:])


def test_compose_escapes_what_it_would_substitute(two_nodes):
    """A dollar sign of a name is doubled; the address of the first node is a variable that must be set."""
    text = render(two_nodes, "compose")
    variables = {"${HEAD:?the address of node 0}", "${VLLM_API_KEY:-}"}
    for service in yaml.safe_load(text)["services"].values():
        for value in [*service["command"], service["volumes"][0]["source"], *service["environment"].values()]:
            for variable in variables:
                value = value.replace(variable, "")
            assert "$" not in value.replace("$$", "")
        assert service["volumes"][0]["source"].replace("$$", "$") == str(two_nodes.model)


def test_kubernetes_probes_outlast_the_load(case):
    """444 GB from a slow volume take more than half an hour; followers, which answer no HTTP, have no probes."""
    _, facts, found = case
    workload, service = yaml.safe_load_all(render(found, "kubernetes"))
    group = workload["spec"]["leaderWorkerTemplate"]
    leader = group.get("leaderTemplate", group["workerTemplate"])["spec"]["containers"][0]
    startup = leader["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= found.load_seconds >= facts["disk_bytes"] / 200e6
    assert facts["disk_bytes"] < 400e9 or found.load_seconds > 30 * 60
    assert leader["resources"]["limits"]["nvidia.com/gpu"] == str(found.devices)
    assert {leader[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")} == {"/health"}
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/name"] == workload["metadata"]["name"]
    if found.nodes > 1:
        follower = group["workerTemplate"]["spec"]["containers"][0]
        assert not any(key.endswith("Probe") for key in follower)
        for pod, headless in ((leader, False), (follower, True)):
            assert "--node-rank=$(LWS_WORKER_INDEX)" in pod["args"]
            assert "--master-addr=$(LWS_LEADER_ADDRESS)" in pod["args"]
            assert ("--headless" in pod["args"]) == headless


@pytest.mark.parametrize("name", [*NAMES, "---", "UPPER_lower.9", "x" * 90])
def test_slugs_are_names_of_kubernetes(name, tmp_path):
    found = Deployment(tmp_path, name, 1, 1, {}, 1).slug
    assert 0 < len(found) <= 40 and set(found) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert found.strip("-") == found


@pytest.fixture
def programs(tmp_path) -> Path:
    """Stand-ins for `ray`, `python3` and `vllm`: the script is what is tested, and these note how it calls them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    bodies = {
        "vllm": 'printf "%s\\0" vllm "$@"',
        "ray": 'printf "%s\\0" ray "$@"',
        "python3": f'echo tried >> {folder}/tries; [ "$(wc -l < {folder}/tries)" -ge 2 ] && echo 2 || echo 1',
        "sleep": "true",
    }
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return folder


def test_ray_waits_for_every_node_and_serves(two_nodes, programs):
    words = ran(render(two_nodes, "ray"), "head", path=programs)
    flags = [
        word for flag, value in two_nodes.flags.items() for word in (flag, *([] if value is None else [str(value)]))
    ]
    serve = ["vllm", "serve", str(two_nodes.model), *flags, "--distributed-executor-backend", "ray"]
    assert words == ["ray", "start", "--head", "--port=6379", "--num-gpus=8", *serve]
    assert len((programs / "tries").read_text().split()) == 2  # one node was there at first


def test_ray_followers_join(two_nodes, programs):
    words = ran(render(two_nodes, "ray"), "worker", "10.0.0.1", path=programs)
    assert words == ["ray", "start", "--address=10.0.0.1:6379", "--num-gpus=8", "--block"]
    with pytest.raises(subprocess.CalledProcessError):
        ran(render(two_nodes, "ray"), "worker", path=programs)


def test_what_cannot_be_served(tmp_path):
    model = opened("m2.7", tmp_path / "model")
    with pytest.raises(InputError, match=r"does not fit on 2 × RTX 4090 .* may have 3\d\.\d GB"):
        deployment(model, fit(model, Machine.parse("2xRTX 4090")))
    with pytest.raises(InputError, match="vLLM does not run on 1 × Mac Studio 512 GB"):
        deployment(model, fit(model, Machine.parse("Mac Studio 512 GB")))
    with pytest.raises(InputError, match="choose command, compose, kubernetes, ray"):
        render(deployment(model, fit(model, Machine.parse("4xH100"))), "helm")


def test_a_tight_fit_serves_what_was_asked_for(tmp_path):
    """The reserve's band reaches below it: what surely fits is less."""
    model = opened("m2.7", tmp_path / "model")
    facts = fit(model, Machine.parse("4xA100"), 196_608)
    assert facts["verdict"] == "tight" and facts["cache"]["longest_context"]["low"] < 196_608
    assert deployment(model, facts).flags["--max-model-len"] == 196_608


def test_the_folder_is_the_registry():
    assert list(RENDERERS) == ["command", "compose", "kubernetes", "ray"]
