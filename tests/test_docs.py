"""The documentation builds without a warning and without a network, is complete, and its links and code work."""

import doctest
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import ncmi_kernels
from ncmi_kernels import testing

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))

if not PAGES or any(importlib.util.find_spec(name) is None for name in ("sphinx", "furo", "myst_parser", "matplotlib")):
    pytest.skip("needs docs/ and requirements-dev.txt", allow_module_level=True)

BUILD = """
import socket, sys
def refuse(*args): raise AssertionError(f"the build wanted to connect to {args[1:]}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", BUILD, "-q", "-W", "--keep-going", "-b", "html", "-d", str(out / "cache")]
    done = subprocess.run(
        [*command, str(DOCS), str(out / "html")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "svg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "html"


class Page(HTMLParser):
    """What a page links to and loads, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.anchors.add(attributes["id"])
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag == "link" and attributes.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.loaded.append(attributes["href"])
        elif "src" in attributes:
            self.loaded.append(attributes["src"])


def problems(site):
    """Links of a site to files or anchors that are not there, and whatever it would fetch from elsewhere."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for loaded in page.loaded:
            if re.match(r"(\w+:)?//", loaded) or not (path.parent / loaded.partition("?")[0]).exists():
                yield path.name, "loads", loaded
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            file, _, anchor = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                yield path.name, "links to", link
    for style in site.rglob("*.css"):
        for url in re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)", style.read_text()):
            yield style.name, "loads", url


def test_links_lead_somewhere_and_nothing_is_fetched(site):
    assert list(site.rglob("*.html"))
    assert list(problems(site)) == []


def test_a_wrong_link_is_found(tmp_path):
    (tmp_path / "other.html").write_text('<h1 id="there">')
    (tmp_path / "page.html").write_text(
        '<a href="other.html#there"><a href="https://arxiv.org"><a href="other.html#nowhere"><a href="gone.html">'
        '<img src="gone.svg"><script src="https://cdn.example/x.js"></script>'
    )
    (tmp_path / "style.css").write_text('@import "https://fonts.example/x.css";')
    found = {wrong for _, _, wrong in problems(tmp_path)}
    assert found == {
        "other.html#nowhere",
        "gone.html",
        "gone.svg",
        "https://cdn.example/x.js",
        "https://fonts.example/x.css",
    }


def test_everything_public_is_in_the_reference(site):
    anchors = Page((site / "api.html").read_text()).anchors
    names = [f"ncmi_kernels.{name}" for name in [*ncmi_kernels.__all__, "NCMIMetric"]]
    methods = [
        f"ncmi_kernels.{cls.__name__}.{name}"
        for cls in (ncmi_kernels.NCMILoss, ncmi_kernels.CentroidSGD)
        for name, value in vars(cls).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, property)) and value.__doc__
    ]
    names += [f"ncmi_kernels.testing.{name}" for name in testing.__all__]
    missing = {*names, *methods} - anchors
    assert not missing


def test_formulas_and_pictures_are_there(site):
    maths = (site / "maths.html").read_text()
    assert maths.count("<math") > 20
    for picture in ("collapse.svg", "simplex.svg"):
        assert f'src="_images/{picture}"' in maths


def test_what_is_included_is_there(site):
    included = {
        "contributing.html": "Setting up",
        "changelog.html": "[Unreleased]",
        "measuring.html": "Method",
        "experiments.html": "4. NCMI against accuracy",
    }
    for page, heading in included.items():
        assert f">{heading}<a" in (site / page).read_text()


def test_every_page_is_reached(site):
    index = Page((site / "index.html").read_text())
    assert {f"{path.stem}.html" for path in PAGES} - {"index.html"} <= set(index.links)


def test_contributing_names_every_test_file():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = [path.name for path in (ROOT / "tests").glob("*.py") if path.name != "conftest.py"]
    assert [name for name in files if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", [path.name for path in PAGES if "```pycon" in path.read_text()])
def test_examples_of_pages(page):
    code = "\n".join(re.findall(r"^```pycon\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE))
    test = doctest.DocTestParser().get_doctest(code, {}, page, page, 0)
    assert test.examples
    out = []
    failed, _ = doctest.DocTestRunner().run(test, out=out.append)
    assert failed == 0, "".join(out)


def test_the_quick_start_learns(capsys):
    (code,) = re.findall(r"^```python\n(import torch\n.*?)^```", (DOCS / "quickstart.md").read_text(), re.DOTALL | re.M)
    exec(compile(code, "quickstart.md", "exec"), {})
    printed = capsys.readouterr().out
    assert float(re.search(r"test accuracy: ([\d.]+)%", printed)[1]) > 95, printed
