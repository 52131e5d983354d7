"""Dense families, one file each: every file defines `FAMILIES`, a tuple of records."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from moemerge.families.family import Family

RECORDS: dict[str, Family] = {
    record.name: record
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda one: one.name)
    for record in importlib.import_module(f"{__name__}.{module.name}").FAMILIES
}
"""Every family of which a mixture can be made, by its model_type."""


def record_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a config, normalised or not; None if it is a mixture's or not known."""
    family = config.get("saved_as", config.get("model_type"))
    record = RECORDS.get(family) if isinstance(family, str) else None
    return None if record is None or record.is_mixture(config) else record
