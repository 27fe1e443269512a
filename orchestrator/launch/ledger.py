"""The ledger: what is ready, one small file for every need that was met; and whether it is still what it was."""

import json
import warnings
from pathlib import Path

from orchestrator import cache, mirror, store
from orchestrator.needs import Place, Ready


def look_up(place: Place, key: str, verify: bool = False) -> Ready | None:
    """What the ledger has for a key, if it is still there; ``verify`` also compares the content of caches."""
    ready = entered(place, key)
    if ready is not None and place.remote:
        return ready if mirror.published(place, ready.path) else None  # compared where it is fetched
    if ready is None or not Path(place.folder(ready.path)).exists():
        return None
    path = Path(place.folder(ready.path))
    if path.parent == Path(place.folder("cache")):
        try:
            cache.open_rows(path, verify=verify)
        except cache.DamagedCache as damage:
            if verify:
                warnings.warn(f"{damage}; building it again", stacklevel=2)
            return None
    files = ready.told.get("files", {}) if verify else {}  # of a teacher; who finds it anew says what is wrong
    whole = all(path.with_name(n).is_file() and cache.file_hash(path.with_name(n)) == sha for n, sha in files.items())
    return ready if whole else None


def entered(place: Place, key: str) -> Ready | None:
    try:
        return Ready(**json.loads(store.read(place.address("ready", f"{key}.json")) or b""))
    except (ValueError, TypeError):
        return None


def enter(place: Place, ready: Ready) -> None:
    """Writes the ledger."""
    store.write(place.address("ready", f"{ready.key}.json"), json.dumps(ready.plain(), indent=1).encode())
