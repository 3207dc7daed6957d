"""The documentation's build: `make docs`. Nothing is fetched, by the build or by the pages that come of it."""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

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

# Pages that are files of the repository.
FILES = {
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "measuring": "benchmarks/README.md",
    "experiments": "benchmarks/experiments/README.md",
}
PAGES = {file: f"{page}.md" for page, file in FILES.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)\s#]+")


def read(app: Sphinx, page: str, source: list[str]) -> None:
    """Put a file in the place of its page. Links lead from file to file in the repository, from page to page here."""
    file = FILES.get(page, f"docs/{page}.md")

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), found[0]))
        return PAGES.get(path, posixpath.relpath(path, "docs"))

    source[0] = LINK.sub(link, (ROOT / file).read_text())


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
    app.connect("source-read", read)
    app.add_html_math_renderer("mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None))
