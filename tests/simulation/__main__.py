"""`make sim`: many seeds, or one with its story.

python -m tests.simulation --seeds 2000 [--first 0] [--replicas 3] [--scenario NAME] [--broken NAME] [--jobs 2]
python -m tests.simulation --seed 17
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulation.broken import BROKEN
from tests.simulation.scenarios import DRAWN, SCENARIOS
from tests.simulation.seeds import results

SHOWN = 3
"""Stories of failing seeds that are printed whole."""


def main() -> int:
    """Exit status 1 if any seed fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--replicas", type=int, default=0, help="2 or 3; by default the seed draws it")
    parser.add_argument(
        "--scenario", default=DRAWN, choices=[DRAWN, "", *SCENARIOS], help="faults that come together; '': one by one"
    )
    parser.add_argument("--broken", default="", choices=["", *BROKEN], help="with a rule taken out; must fail")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    flags = parser.parse_args()
    seeds = [flags.seed] if flags.seed is not None else range(flags.first, flags.first + flags.seeds)
    jobs = [(seed, flags.replicas, flags.scenario, flags.broken) for seed in seeds]
    began, counts, failed = time.monotonic(), Counter[str](), list[int]()
    for seed, how, story in results(jobs, flags.jobs):
        counts[how] += 1
        if story:
            failed.append(seed)
            print(story if len(failed) <= SHOWN else story.splitlines()[0][:300], flush=True)
    took = time.monotonic() - began
    print(f"{sum(counts.values())} seeds in {took:.1f} s: {dict(counts)}" + (f"; failed: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
