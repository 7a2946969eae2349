"""vLLM as the server: what to execute, and the files that others execute it from, one file a way of writing."""

from ...errors import InputError
from ...registry import collect
from .base import Deployment, Renderer, deployment

RENDERERS = collect(__name__, Renderer)


def render(what: Deployment, way: str) -> str:
    """`what` written down as `command`, `compose`, `kubernetes` or `ray`. Raises `InputError` for another word."""
    if way not in RENDERERS:
        raise InputError(f"a deployment cannot be printed as {way!r}; choose {', '.join(RENDERERS)}")
    return RENDERERS[way].render(what)


__all__ = ["RENDERERS", "Deployment", "Renderer", "deployment", "render"]
