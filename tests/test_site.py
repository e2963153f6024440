"""The site as `make docs` builds it: strictly, with links that lead somewhere, and nothing from another host."""

import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import dpo_lightning
from conftest import REPO
from dpo_lightning.dpo.losses import LOSSES

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}  # by a browser, unasked


class Page(HTMLParser):
    """A page's anchors, links, what it loads, and the tags that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.loads, self.tags = set(), [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.add(tag)
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADED and LOADED[tag] in given and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, made from a copy of what it is made from."""
    for package in ("zensical", "mkdocstrings_handlers.python", "math_core"):
        pytest.importorskip(package, reason="the extra `docs` is not installed")
    copy = tmp_path_factory.mktemp("site")
    for folder in ("docs", "tools", "src"):
        shutil.copytree(REPO / folder, copy / folder, ignore=shutil.ignore_patterns("*.safetensors", "*.jsonl"))
    shutil.copy(REPO / "zensical.toml", copy)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_of_the_site_leads_somewhere(site, pages):
    assert len(pages) >= len(list((REPO / "docs").rglob("*.md")))
    for path, page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site.resolve()) and target.is_file(), f"{path.relative_to(site)}: {link}"
            if url.fragment and target in pages:
                assert unquote(url.fragment) in pages[target].ids | {"__"}, f"{path.relative_to(site)}: {link}"


def test_no_page_loads_anything_from_another_host(site, pages):
    for path, page in pages.items():
        assert not [link for link in page.loads if urlsplit(link).netloc], path
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*['\"]?https?:", sheet.read_text()), sheet


def test_equations_are_drawn_by_the_browser(site, pages):
    losses = site / "losses" / "index.html"
    text = losses.read_text()
    assert text.count("<math") > len(LOSSES) and "$`" not in text and "math-core-error" not in text
    font = (site / "assets" / "site.css").read_text().split('url("')[1].split('"')[0]
    assert (site / "assets" / font).is_file()


def test_every_page_is_in_the_navigation():
    def files(items):
        for item in items:
            for value in item.values():
                yield from [value] if isinstance(value, str) else files(value)

    docs = REPO / "docs"
    listed = list(files(tomllib.loads((REPO / "zensical.toml").read_text())["project"]["nav"]))
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert there == set(listed), "each page of docs/ has a line of `nav` in zensical.toml"


def test_the_api_page_has_every_public_name(pages, site):
    there = re.findall(r"^::: dpo_lightning\.(\w+)$", (REPO / "docs" / "api.md").read_text(), re.M)
    assert sorted(there) == sorted(dpo_lightning.__all__)
    assert {f"dpo_lightning.{name}" for name in there} <= pages[site / "api" / "index.html"].ids


def test_the_picture_is_what_its_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(REPO)
    from tools.packed_batch import PICTURE, svg

    assert PICTURE.read_text() == svg(), "draw it anew: python tools/packed_batch.py"
