"""The documentation's build: `make docs`. Nothing is fetched, by the build or by the pages that come of it."""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pictures

import ncmi_kernels

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "ncmi_kernels"
release = ncmi_kernels.__version__
author = "The ncmi_kernels authors"
project_copyright = "the ncmi_kernels authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]
smartquotes_action = "D"  # dashes only: "nsf" is to be copied
default_role = "literal"  # `name` in the docstrings
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_type_aliases = {"Tensor": "Tensor"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape", "Loss and gradients"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"ncmi_kernels {release}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_copy_source = False

# Where the repository's pages are on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "measuring.md",
    "benchmarks/experiments/README.md": "experiments.md",
}
# A line that is only this link; who reads the page as Markdown follows it.
INCLUDE = re.compile(r"^\[(?P<file>\S+\.md)(?:: (?P<heading>.+))?\]\(\.\./(?P=file)(?:#\S+)?\)$", re.MULTILINE)
LINK = re.compile(r"(?P<before>\]\()(?!\w+:|#)(?P<path>[^)\s#]+)(?P<after>(?:#[^)\s]+)?\))")


def section(text: str, heading: str | None) -> str | None:
    """The section of a Markdown file, with its heading, or all of it; None if there is no such section."""
    if heading is None:
        return text
    found: list[str] = []
    level, fenced = 0, False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        marks = 0 if fenced else len(line) - len(line.lstrip("#"))
        if marks and level and marks <= level:
            break
        if marks and line[marks:].strip() == heading:
            level = marks
        if level:
            found.append(line)
    return "\n".join(found) if found else None


def included(file: str, heading: str | None) -> str:
    """What a page includes of a file of the repository, with the file's links as the page has to write them."""
    text = section((ROOT / file).read_text(), heading)
    if text is None:
        raise ExtensionError(f"include: got heading {heading!r}, which {file} does not have")

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), found["path"]))
        return found["before"] + PAGES.get(path, posixpath.relpath(path, "docs")) + found["after"]

    return LINK.sub(link, text)


def include(app: Sphinx, page: str, source: list[str]) -> None:
    """Put sections of the repository's Markdown files in the place of `[FILE: HEADING](../FILE#heading)`."""
    source[0] = INCLUDE.sub(lambda found: included(found["file"], found["heading"]), source[0])


def mathml(writer: Any, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw themselves."""
    block = isinstance(node, nodes.math_block)
    markup = latex2mathml.tex2mathml(node.astext(), as_block=block)
    # As TeX has them: a thin space after "log", and bars that do not grow with what is between them.
    markup = re.sub(r"(<mo>&ApplyFunction;</mo>)(?!\s*<mo[^>]*>\()", r'\1<mspace width="0.17em"></mspace>', markup)
    markup = markup.replace("<mo>‖</mo>", '<mo stretchy="false">‖</mo>')
    writer.body.append(f'<div class="math">{markup}</div>' if block else markup)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    pictures.draw(DOCS / "build" / "pictures")
    app.connect("source-read", include)
    app.add_html_math_renderer("mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None))
