"""The site: `make docs` builds docs/*.md into build/docs, offline; warnings are errors."""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

project = "elastic"
copyright = "the elastic authors, Apache-2.0"
html_title = "elastic"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # so that guides can link to each other's sections
myst_enable_extensions = ["colon_fence"]
default_role = "code"  # of single backticks in docstrings
highlight_language = "text"  # of blocks that name none
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False

# What a browser would load by itself: scripts, style sheets, images, fonts. Links are not loaded.
_LOADED = {
    ".html": r"""<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=["']?"""
    r"""((?:https?:)?//[^"'> ]+)""",
    ".css": r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"') ]+)""",
}


def check_assets(app: Sphinx, error: Exception | None) -> None:
    """Fail where a page would load something over the network."""
    if error is not None:
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in _LOADED:
            found = re.search(_LOADED[path.suffix], path.read_text())
            if found is not None:
                raise SphinxError(f"{path}: loads {found[1]}; the site must work offline")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("build-finished", check_assets)
