"""hidden: the default; prompt averaging, as `hidden_avg`."""

from moemerge.gates.hidden_avg import USES, routers

__all__ = ["USES", "routers"]
