"""How an operator becomes a `torch.library` operator (`torch.ops.zipvl.*`) that costs eager callers nothing."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_LIBRARY = torch.library.Library("zipvl", "DEF")  # type: ignore[no-untyped-call]


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function under `schema`, with `fake` for shapes alone; return what callers should call.

    Under `torch.compile` that is the registered operator, one opaque node in the graph. In eager mode it is the
    function itself, since going through the dispatcher costs several microseconds a call.
    """
    name = schema[: schema.index("(")]

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(body)
        def run(*args: Any) -> Any:
            """The body as it is meant: without gradients, and in its own dtypes under autocast."""
            device = args[0].device.type if isinstance(args[0], torch.Tensor) else "cpu"
            if torch.is_autocast_enabled(device):
                with torch.no_grad(), torch.autocast(device, enabled=False):
                    return body(*args)
            with torch.no_grad():
                return body(*args)

        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"zipvl::{name}", fake, lib=_LIBRARY)
        registered = getattr(torch.ops.zipvl, name).default

        @wraps(body)
        def call(*args: Any) -> Any:
            return registered(*args) if torch.compiler.is_compiling() else run(*args)

        return call

    return register
