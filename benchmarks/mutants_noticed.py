"""How many wrong Core ML programs the checks of an export notice, by kind of mistake.

Every mutant is one random change to the program or the weights of a small exported model. Prints
how many of those that compute something else were noticed and by which check, then every one that
was missed and every one that computes the same.

    python benchmarks/mutants_noticed.py --count 1000 --seed 1
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Run the survey that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="mutants, over all programs")
    parser.add_argument("--seed", type=int, default=0, help="chooses the mutants")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
    from mutants import Survey, mutants

    with tempfile.TemporaryDirectory() as folder:
        survey = Survey(mutants(given.count, given.seed, Path(folder)))
    print(survey.table())
    print(f"noticed: {survey.share:.1%} of {len(survey.changed)}")


if __name__ == "__main__":
    main()
