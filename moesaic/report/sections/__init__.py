"""The parts of the page, one file each, found by listing this folder, in the order of their places.

A part that has nothing to show leaves itself out.
"""

from ...registry import collect
from .base import Part

PARTS = {part.name: part for part in sorted(collect(__name__, Part).values(), key=lambda part: part.place)}
