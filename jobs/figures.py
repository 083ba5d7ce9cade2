"""Draw the paper's figures (2, 4 to 9) and tables from a run's tables: PNG, PDF and Markdown.

python jobs/figures.py --run runs/demo
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command
from pipeline.figures import book


def main(options: Annotated[book.Options, command.FLAT]) -> int:
    """Write RUN/figures."""
    book.draw(options)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
