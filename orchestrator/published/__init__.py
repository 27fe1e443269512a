"""Published numbers with their source. Shown beside ours as "published", never mixed with them.

One file per source. It exports ``BESIDE``: the name of a search space -> the rows that belong
beside that sweep. Files are found by name: adding a paper is adding its file.
"""

import importlib
import pkgutil

from orchestrator.published._row import (
    ALONE,
    BOTH_SIDES,
    NO_TEACHER,
    OWN_NETWORK,
    TEACHER,
    Published,
    network,
)

__all__ = ["ALONE", "BOTH_SIDES", "NO_TEACHER", "OWN_NETWORK", "TEACHER", "Published", "beside", "network", "sources"]


def sources() -> list[str]:
    """File names of this package that hold rows."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def beside(space: str, benchmark: str) -> list[Published]:
    """The rows of all sources to show beside a sweep on a benchmark."""
    found = [importlib.import_module(f"{__name__}.{name}").BESIDE.get(space, []) for name in sources()]
    return [p for rows in found for p in rows if p.elsewhere or p.benchmark == benchmark]
