"""What lies in a folder of pictures: images, what is none, and what systems hide beside them."""

import os
from collections.abc import Sequence
from pathlib import Path

from orchestrator.datasets.images import IMAGE_SUFFIXES, printable

# What Windows, macOS and network drives write into every folder, beside names with a leading dot.
_OF_SYSTEMS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "__macosx", "icon\r", "@eadir"}
_NAMED = 3  # of the files that are left out


def is_hidden(path: str) -> bool:
    """Whether a part of a relative path is hidden, or is what a system puts beside images.

    >>> [is_hidden(p) for p in ("a/1.jpg", "a/._1.jpg", ".ipynb_checkpoints/1.jpg", "a/Thumbs.db", "__MACOSX/1.jpg")]
    [False, True, True, True, True]
    """
    return any(part.startswith(".") or part.lower() in _OF_SYSTEMS for part in path.split("/"))


def is_image(path: str) -> bool:
    """Whether the name ends as that of an image does, in capital or small letters.

    >>> [is_image(p) for p in ("a/1.JPG", "a/1.jpg.jpg", "a/1.txt", "jpg")]
    [True, True, False, False]
    """
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def files_below(name: str, folder: Path, depth: int | None = None) -> list[str]:
    """Files below a folder as relative paths, in order of their parts; none if there is no folder.

    Hidden files and folders are left out; links to files and to folders are followed.

    Args:
        name: who asks, for the errors.
        depth: 1 = only files directly in the folder, None = at any depth.

    Raises:
        FileNotFoundError: links that lead nowhere.
        ValueError: a link to a folder that holds it.
    """
    found: list[str] = []
    broken: list[str] = []
    waiting = [("", (os.path.realpath(folder),))] if folder.is_dir() else []
    while waiting:
        below, above = waiting.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                path = f"{below}{entry.name}"
                if is_hidden(entry.name):
                    continue
                if entry.is_symlink() and not os.path.exists(entry.path):
                    broken.append(path)
                elif entry.is_file():
                    found.append(path)
                elif entry.is_dir() and (depth is None or len(above) < depth):
                    real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                    if real in above:
                        raise ValueError(f"{name}: {folder / path} is a link to a folder that holds it; remove it")
                    waiting.append((f"{path}/", (*above, real)))
    if broken:
        first = folder / min(broken)
        raise FileNotFoundError(
            f"{name}: links that lead nowhere: {len(broken)} below {folder}, first {first} to {os.readlink(first)}; "
            f"repair or remove them"
        )
    return sorted(found, key=lambda path: path.split("/"))


def left_out(files: Sequence[str], expected: str) -> str:
    """One sentence that counts the files a reader does not take and names the first, images first.

    >>> left_out(["a/notes.txt", "b/cam1/5.png"], "<identity>/<image>")
    '2 files were left out: b/cam1/5.png, a/notes.txt; what is read are images at <identity>/<image>'
    """
    if not files:
        return ""
    named = sorted(files, key=lambda path: (not is_image(path), path))[:_NAMED]
    count = f"{len(files):,} files were" if len(files) > 1 else "1 file was"
    names = ", ".join([*named, "…"] if len(files) > _NAMED else named)
    return f"{count} left out: {printable(names)}; what is read are images at {expected}"
