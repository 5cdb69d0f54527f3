"""Hooks of `mkdocs build`: what pages link to outside of docs/ becomes part of the site, under `project/`.

`docs/papers.md` links to `../configs/papers/simpo.yaml`, which works in a clone and on GitHub. A site has only what is
in docs/. So linked files of the repository are copied into it, Markdown files as pages, and the links are rewritten.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PLACE = "project"
"""The site's folder for files from outside of docs/."""
TO_FOLDER = re.compile(r"\[([^]]+)\]\(([^)#\s]+)\)")
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def on_files(files: Any, config: Any) -> Any:
    """Add the files of the repository that pages link to, and those that these link to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages() if (DOCS / file.src_uri).exists()]
    seen: set[Path] = set()
    while waiting:
        source = waiting.pop()
        for link in LINK.findall(source.read_text(encoding="utf-8")):
            path = linked(source, link)
            if path is None or path in seen or path.is_relative_to(DOCS):
                continue
            seen.add(path)
            name = f"{PLACE}/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
            if path.suffix == ".md":
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links to where the files are in the site; a link to a folder becomes its text."""
    name = page.file.src_uri
    outside = name.startswith(f"{PLACE}/")
    source = ROOT / name.removeprefix(f"{PLACE}/") if outside else DOCS / name

    def rewritten(match: re.Match[str]) -> str:
        path = linked(source, match[1])
        if path is None or (path.is_relative_to(DOCS) and not outside):
            return match[1]
        inside = path.is_relative_to(DOCS)
        target = path.relative_to(DOCS).as_posix() if inside else f"{PLACE}/{path.relative_to(ROOT).as_posix()}"
        return posixpath.relpath(target, posixpath.dirname(name))

    def without_folder(match: re.Match[str]) -> str:
        return match[1] if (source.parent / match[2]).is_dir() else match[0]

    return LINK.sub(rewritten, TO_FOLDER.sub(without_folder, markdown))


def linked(source: Path, link: str) -> Path | None:
    """The file of the repository that a page's link leads to; None for addresses and for what does not exist."""
    if re.match(r"\w+:", link):
        return None
    path = (source.parent / link).resolve()
    return path if path.is_file() and path.is_relative_to(ROOT) else None
