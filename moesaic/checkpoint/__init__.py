"""Models on disk: opened, read, written, and told what they hold.

containers/ knows how codes and scales lie in a file; open.py reads a folder, shards.py writes one, safetensors_reader.py
reads it by other people's code; digests.py is the SHA-256 of all that is in it. Leaves out what the numbers mean (formats).
"""

from .open import INDEX, PLAUSIBLE_RMS, Checkpoint, Stored, read_header, read_object, reading, sample

__all__ = ["INDEX", "PLAUSIBLE_RMS", "Checkpoint", "Stored", "read_header", "read_object", "reading", "sample"]
