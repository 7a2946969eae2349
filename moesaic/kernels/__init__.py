"""Compiled twins of decode, fit, search, round and pack: from a source's stored bytes to an export's, in one pass."""
