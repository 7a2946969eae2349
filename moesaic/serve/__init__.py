"""A server at the end of the path: vLLM, launched or written down, for machines that have it."""
