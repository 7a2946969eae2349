"""Options and checkpoints that several test files share. Small models are made on the fly: a clone needs nothing beside it."""

import os
import signal
from pathlib import Path

import loads
import pytest
import tiny
import torch

from moesaic.checkpoint import Checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton, which looks once

# A shell that starts the tests in the background has Ctrl-C ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    engines = parser.getgroup("engines", "stock engines that load what was exported (tests/engines)")
    engines.addoption("--vllm-python", metavar="PATH", help="python of an environment that has vLLM's CPU build")
    engines.addoption("--mlx-python", metavar="PATH", help="python of an environment that has mlx[cpu] and mlx-lm")
    engines.addoption("--loads", metavar="FILE", type=Path, help="keep what was loaded by what (tests/loads.py)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if (file := config.getoption("--loads")) is not None:
        passed = {report.nodeid: report.user_properties for report in terminalreporter.getreports("passed")}
        fallen = [report.nodeid for kind in ("failed", "error") for report in terminalreporter.getreports(kind)]
        loads.keep(file, passed, fallen)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def m2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """MiniMax-M2 in FP8 blocks, a few layers and experts, random."""
    return made(tmp_path_factory, "minimax_m2")


@pytest.fixture(scope="session")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """MiniMax-M3 in MXFP8 with its vision tower, random; rows of 128 at least, so that every group size fits."""
    return made(tmp_path_factory, "minimax_m3_vl", hidden_size=256, intermediate_size=128, shared_intermediate_size=128)


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Mixtral in BF16, random: no correction bias, no shared expert, no vision, run by its layers' own forward."""
    return made(tmp_path_factory, "mixtral")


@pytest.fixture(params=("m2", "m3", "mixtral"))
def source(request: pytest.FixtureRequest) -> Checkpoint:
    """Each family in turn."""
    found: Checkpoint = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=("m2", "m3"))
def minimax(request: pytest.FixtureRequest) -> Checkpoint:
    """Those of them with a correction bias, quantized by their vendor."""
    found: Checkpoint = request.getfixturevalue(request.param)
    return found


def made(tmp_path_factory: pytest.TempPathFactory, family: str, **overrides: int) -> Checkpoint:
    return Checkpoint.open(tiny.make(tmp_path_factory.mktemp("tiny") / family, family, **overrides))
