"""The pages whose Python blocks show what they print are true."""

import doctest
import re

import pandas as pd
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
    if Run.at(str(place / cookbook.RUN)).describe()["model_id"] in text:
        assert now == text, f"{page.name} is out of date: run `make docs` and commit it"
    else:  # this machine trains other bits than the page's
        assert forms(now) == forms(text), f"{page.name} shows other columns than its blocks print: run `make docs`"


@pytest.mark.parametrize("page", ["README", "docs/tutorial", "docs/tables", "docs/evaluation", "docs/evolution"])
def test_what_other_pages_ask_with_pandas_can_be_asked(place, page, monkeypatch):
    """Their answers are of other runs, and are not compared."""
    blocks = re.findall(r"```python\n(.*?)```", (cookbook.ROOT / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(place)
    names = {"pd": pd}
    for block in blocks:
        examples = doctest.DocTestParser().get_examples(block)
        source = "".join(example.source for example in examples) or block
        exec(re.sub(r"\bruns/\w+", cookbook.RUN, source), names)


def forms(page):
    """Of each answer how many lines it has, and what stands in its first one beside numbers, where it has several."""
    answers = [answer.strip().splitlines() for answer in re.findall(r"```text\n(.*?)```", page, re.DOTALL)]
    return [(len(lines), re.findall(r"[a-z]\w*", lines[0]) if len(lines) > 1 else []) for lines in answers]


def test_the_form_of_an_answer_is_its_columns_and_its_number_of_lines():
    page = "```text\n   map  share\n0  1    0.25\n```\n\n```text\n3 of 4 maps\n```\n"
    assert forms(page) == [(2, ["map", "share"]), (1, [])]
    assert forms(page.replace("0.25", "0.75").replace("3 of", "17 of")) == forms(page)
    assert forms(page.replace("share", "lost")) != forms(page)
    assert forms(page.replace("0  1    0.25\n", "")) != forms(page)


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
