"""The whole path in two minutes: half the experts of a small trained model dropped, the rest rounded to MXFP4.

Downloads nothing: the model comes with the project, the text with the Python that runs it.
"""

from pathlib import Path
from typing import Any

from ..allocate import Offer
from ..data.corpus import Corpus
from .compress import Recipe, compress
from .compress import use as use_of
from .machine import Use

MODEL = Path(__file__).parent / "demo_model"
TEXT = Corpus(tokens=24_576, length=256)
RECIPE = Recipe(offer=Offer(experts=16), format="mxfp4", evaluation_tokens=16_384)


def demo(run: Path, quiet: bool = False) -> dict[str, Any]:
    """Compress the demo model into `run`; returns the facts of `compress`."""
    return compress(MODEL, run, RECIPE, TEXT, command=f"moesaic demo {run}", quiet=quiet)


def use(run: Path) -> Use:
    """What of the machine `demo` takes."""
    return use_of(MODEL, run, TEXT)
