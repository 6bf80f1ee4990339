import re
from pathlib import Path

import pytest

from service.api.page import FOLDER

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = sorted(FOLDER.iterdir())


def test_the_root_is_the_playground_under_a_strict_policy(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_part_has_its_type_and_is_asked_for_again_cheaply(client, path):
    answer = client.get(f"/page/{path.name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0].replace("application/j", "text/j") == TYPES[path.suffix]
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.content == path.read_bytes()
    again = client.get(f"/page/{path.name}", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304
    assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", ["", "nothing.js", "..%2fapp.py", "%2e%2e/app.py", "%00"])
def test_nothing_else_is_served_there(client, name):
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_address_is_relative_and_nothing_is_inline(path):
    """So the page works under any prefix, asks nobody else, and needs no exception from its policy."""
    text = path.read_text()
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"(?:src|href|action|url\(|from|fetch\(|ask\(|call\()\s*=?\s*[\"'`(]/", text)
    if path.suffix == ".html":
        assert not re.search(r"\s(?:on\w+|style)=", text)
        assert not re.search(r"<(?:style|script(?![^>]*\ssrc=))", text)
    if path.suffix == ".js":
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)


def test_the_page_asks_for_no_element_that_it_lacks():
    ids = set(re.findall(r'\sid="([^"]+)"', (FOLDER / "index.html").read_text()))
    for path in FOLDER.glob("*.js"):
        asked = set(re.findall(r'(?:element|put)\("([^"$]+)"', path.read_text()))
        assert asked <= ids, f"{path.name} asks for {asked - ids}"


def test_every_module_of_the_page_is_used():
    sources = "".join(path.read_text() for path in FILES)
    assert {path.name for path in FILES} - {"index.html"} == {
        Path(name).name for name in re.findall(r"(?:page|\.)/([\w-]+\.(?:js|css|svg))\"", sources)
    }
