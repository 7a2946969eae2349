"""A server at the end of the path: vLLM, launched or written down, or a small one of our own."""
