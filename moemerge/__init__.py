"""Make one mixture-of-experts language model out of several dense ones.

from moemerge import load_config, make_plan, merge, verify_checkpoint

print(make_plan("config.yaml").plan.parameters)
merge("config.yaml", "out/", progress=True)
verify_checkpoint("out/")
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, whose import takes time
if TYPE_CHECKING:
    from typing import Any

    from moemerge.public import *  # noqa: F403
    from moemerge.public import __all__ as __all__


def __getattr__(name: str) -> Any:
    """A name of `moemerge.public`, imported when it is asked for: a command that has just begun
    imports nothing before it watches for Ctrl-C."""
    from importlib import import_module, util

    is_room = not name.startswith("__") and util.find_spec(f"moemerge.{name}")
    public = None if is_room else import_module("moemerge.public")
    if public and (name == "__all__" or name in public.__all__):
        return getattr(public, name)
    raise AttributeError(f"module 'moemerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
