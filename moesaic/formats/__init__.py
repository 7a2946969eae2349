"""Number formats, one file an idea. `FORMATS["mxfp4"]` is formats/mxfp4.py."""

from ..registry import collect
from .base import NumberFormat, Scales, Steps

FORMATS = collect(__name__, NumberFormat, "recode")

__all__ = ["FORMATS", "NumberFormat", "Scales", "Steps"]
