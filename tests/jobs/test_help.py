"""Help that fits a screen, the nearest option to one that does not exist, and completion in a shell."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.jobs import shell

JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__")
SCREEN = 45  # lines
COLUMNS = 100


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What --help of each job prints on a terminal of 100 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(COLUMNS))
        return {job: shell.run(job, "--help").out for job in JOBS}


def docstring(job: str) -> list[str]:
    text = ast.get_docstring(ast.parse((ROOT / "jobs" / f"{job}.py").read_text()))
    return [line for line in (text or "").splitlines() if line]


@pytest.mark.parametrize("job", JOBS)
def test_help_fits_a_screen_and_says_what_the_job_is_for_and_how_it_is_called(helps, job):
    lines = helps[job].splitlines()
    assert 8 < len(lines) <= SCREEN
    assert set(docstring(job)) <= set(lines)
    assert [line for line in docstring(job) if line.startswith(f"python jobs/{job}.py")]
    assert all(len(line) <= COLUMNS for line in lines if line.startswith("  -"))


@pytest.mark.parametrize("job", ["atlas", "import_model", "top9", "train", "units"])
def test_no_option_is_left_out_of_the_help(helps, job):
    full = shell.run(job, "--help-verbose").out
    options = set(re.findall(r"^│ (--[\w.-]+)", full, re.MULTILINE)) - {"--help"}
    assert {"--run"} < options
    assert options == set(re.findall(r"^  (--[\w.-]+)", helps[job], re.MULTILINE))


def test_a_job_finds_the_project_from_any_folder(tmp_path):
    job = [sys.executable, str(ROOT / "jobs" / "top9.py"), "--help"]
    done = subprocess.run(job, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert docstring("top9")[0] in done.stdout


def test_a_line_holds_what_is_taken_the_first_sentence_and_the_default(helps):
    assert re.search(r"^  --k INT +Images kept for each feature map\. \[9\]$", helps["top9"], re.MULTILINE)
    assert re.search(r"^  --plan +Print forwards", helps["top9"], re.MULTILINE)
    assert re.search(r"^  --init \{paper,he\} +First weights: the paper's N", helps["train"], re.MULTILINE)


def test_the_help_of_one_of_several_commands_is_whole():
    assert "Folder for the shards" in shell.run("shards", "imagefolder", "--help").out


@pytest.mark.parametrize(
    ("job", "given", "meant"),
    [
        ("top9", "--layer", "--layers"),
        ("train", "--epoch", "--epochs"),
        ("deconv", "--semantic.seed", "--semantics.seed"),
        ("occlusion", "--rnu", "--run"),
        ("atlas", "--rnu", "--run"),
        ("units", "--agianst", "--against"),
    ],
)
def test_an_option_that_does_not_exist_is_answered_with_the_nearest(job, given, meant):
    done = shell.run(job, given, "3")
    assert done.status == 2
    assert re.search(rf"^│ +{re.escape(meant)}\b", done.err + done.out, re.MULTILINE)


def test_a_command_that_does_not_exist_is_answered_with_the_nearest():
    done = shell.run("shards", "imagefolders", "photos")
    assert done.status == 2
    assert "imagefolder" in done.err + done.out


COMPLETE = """
eval "$(cat "$1")"
COMP_WORDS=(top9.py {words}); COMP_CWORD={place}
"$(complete -p | sed -n 's/.*-F \\([^ ]*\\) .*/\\1/p' | tail -1)"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "place", "expected"),
    [
        ("--la", 1, {"--layers"}),
        ("--decode s", 2, {"scaled"}),
        ("--max-", 1, {"--max-skipped"}),
    ],
)
def test_bash_completes_options_and_their_values(tmp_path, words, place, expected):
    script = tmp_path / "completion"
    script.write_text(shell.run("top9", "--tyro-print-completion", "bash").out)
    asked = ["bash", "--norc", "-c", COMPLETE.format(words=words, place=place), "bash", str(script)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
    assert {word.split("\t")[0].strip() for word in done.stdout.split("\n")} - {""} == expected
