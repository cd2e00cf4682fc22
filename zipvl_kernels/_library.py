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
        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"zipvl::{name}", fake, lib=_LIBRARY)
        registered = getattr(torch.ops.zipvl, name).default

        @wraps(body)
        def call(*args: Any) -> Any:
            return registered(*args) if torch.compiler.is_compiling() else body(*args)

        return call

    return register
