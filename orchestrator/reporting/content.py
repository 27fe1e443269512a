"""What a report is made of, and its files: HTML that refers to no other file, Markdown, pictures."""

import base64
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Link:
    """A cell, or a part of one, that leads somewhere."""

    text: str
    url: str


@dataclass
class TableOf:
    head: list[str]
    rows: list[list[Any]]  # a cell is a text, or a list of links
    numeric: set[int] = field(default_factory=set)  # columns that are aligned to the right
    caption: str = ""
    best: int = -1  # a row that stands out
    published: bool = False


@dataclass
class Picture:
    name: str
    alt: str
    png: bytes

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass
class Section:
    title: str
    text: str = ""
    tables: list[TableOf] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    code: str = ""
    facts: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    title: str
    question: str
    summary: str
    sections: list[Section]

    @property
    def pictures(self) -> list[Picture]:
        return [picture for section in self.sections for picture in section.pictures]


def drawn(name: str, alt: str, figure: Figure) -> Picture:
    """The figure as a PNG file of that name."""
    stored = io.BytesIO()
    figure.savefig(stored, format="png", dpi=110)
    return Picture(name, alt, stored.getvalue())


def write(report: Report, folder: Path) -> list[Path]:
    """Writes report.html, report.md and figures/*; returns their paths in this order."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files = {}
    for kind in ("html", "md"):
        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        template = jinja2.Environment(loader=loader, autoescape=kind == "html").get_template(f"report.{kind}")
        files[folder / f"report.{kind}"] = template.render(vars(report)).encode()
    files |= {folder / "figures" / picture.name: picture.png for picture in report.pictures}
    for path, data in files.items():
        _replace(path, data)
    return list(files)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    partial.write_bytes(data)
    os.replace(partial, path)
