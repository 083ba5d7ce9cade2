"""The pages whose Python blocks show what they print are true."""

import re

import pytest

from docs.generate import cookbook
from pipeline.runs import Run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the run that the pages ask."""
    place = tmp_path_factory.mktemp("cookbook")
    cookbook.make(place)
    return place


@pytest.mark.parametrize("page", cookbook.PAGES, ids=lambda page: page.stem)
def test_what_the_page_shows_is_what_its_blocks_print(place, page, monkeypatch):
    monkeypatch.chdir(place)
    text = page.read_text()
    now = cookbook.printed(text)
    if Run.at(str(place / cookbook.RUN)).describe()["model_id"] not in text:
        pytest.skip("every block runs; this machine trains other bits than the page's, so outputs cannot be compared")
    assert now == text, f"{page.name} is out of date: run `make docs` and commit it"


def test_the_cookbook_answers_at_least_fifteen_questions():
    text = cookbook.PAGES[0].read_text()
    questions = re.split(r"^### .*\n", text, flags=re.MULTILINE)[1:]
    assert len(questions) >= 15
    assert all("```python" in question and "```text" in question for question in questions)


def test_a_block_prints_its_last_value_and_what_it_says(tmp_path):
    page = "a\n```python\nx = 2\nprint('said')\nx\n```\n\n```text\nold\n```\nb\n```python\ny = x\n```\n"
    now = "a\n```python\nx = 2\nprint('said')\nx\n```\n\n```text\nsaid\n2\n```\nb\n```python\ny = x\n```\n"
    assert cookbook.printed(page) == now
    assert cookbook.printed(now) == now
