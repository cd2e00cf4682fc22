"""ZipVL in Hugging Face transformers: `attach` a policy to a model, or give `generate()` a `ZipVLCache`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipvl_adapters.attention import ATTENTION
    from zipvl_adapters.cache import ZipVLCache
    from zipvl_adapters.families import visual_boxes
    from zipvl_adapters.fused import fused_projections
    from zipvl_adapters.loading import LoadError, load
    from zipvl_adapters.policy import Policy, ZipVLPolicy
    from zipvl_adapters.session import Session, attach, enable
    from zipvl_adapters.static import ZipVLStaticCache
    from zipvl_adapters.stats import LayerStats, Stats

__all__ = [
    "ATTENTION",
    "LayerStats",
    "LoadError",
    "Policy",
    "Session",
    "Stats",
    "ZipVLCache",
    "ZipVLPolicy",
    "ZipVLStaticCache",
    "attach",
    "enable",
    "fused_projections",
    "load",
    "visual_boxes",
]

# transformers takes seconds to import: names are loaded when they are first asked for.
_HOME = {
    "ATTENTION": "attention",
    "LayerStats": "stats",
    "LoadError": "loading",
    "Policy": "policy",
    "Session": "session",
    "Stats": "stats",
    "ZipVLCache": "cache",
    "ZipVLPolicy": "policy",
    "ZipVLStaticCache": "static",
    "attach": "session",
    "enable": "session",
    "fused_projections": "fused",
    "load": "loading",
    "visual_boxes": "families",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
