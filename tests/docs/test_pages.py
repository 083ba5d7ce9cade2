"""Every page is reachable, every link and command in it leads somewhere, and the site builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.generate import commands
from tests.conftest import ROOT
from tests.jobs.parse import would_take

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub and mkdocs make it."""
    titles = re.findall(r"^#+ (.+)$", _CODE.sub(lambda code: code[0].strip("`"), page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in _LINK.findall(_CODE.sub("", page.read_text())):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_no_page_links_out_of_the_folder_that_is_the_site():
    for page in ROOT.glob("docs/*.md"):
        for link in _LINK.findall(_CODE.sub("", page.read_text())):
            assert not link.startswith(".."), f"{page.name}: {link}: the site holds docs/ alone"


def test_every_job_that_a_page_names_exists():
    for page in PAGES:
        for job in set(re.findall(r"(?<!tests/)\bjobs/(\w+)\.py", page.read_text())):
            assert job == "NAME" or (ROOT / "jobs" / f"{job}.py").is_file(), f"{page.name}: jobs/{job}.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_jobs_would_take_every_command_of_a_page(page):
    """Options and their values, of the lines in blocks of code, but for `...`, which a reader fills in, and `$(`."""
    for block in re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), re.DOTALL):
        for command in re.findall(r"^(?:ray job.*-- )?(python jobs/.+)", block.replace("\\\n", " "), re.MULTILINE):
            given = command.split("  #")[0].strip()
            if "..." not in given and "$(" not in given:
                would_take(given)


def test_every_page_is_in_the_site_s_navigation_and_on_its_first_page():
    pages = {path.name for path in ROOT.glob("docs/*.md")}
    navigation = set(re.findall(r"[\w.]+\.md", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    assert pages == navigation, "add the page to nav in mkdocs.yml"
    first = set(_LINK.findall((ROOT / "docs" / "index.md").read_text()))
    assert pages - first == {"index.md"}, "add the page to docs/index.md"


def test_the_page_of_commands_is_current():
    assert commands.PAGE.read_text() == commands.page(), "docs/commands.md is out of date: run `make docs`, commit it"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=quiet, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "tables.html").is_file()
    assert "http" not in "".join(re.findall(r"<(?:script|link)[^>]+>", (tmp_path / "site" / "index.html").read_text()))
