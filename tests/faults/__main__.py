"""`python -m tests.faults --seed N --seconds 120 --jobs 200 --watchers 100`: a seeded schedule of faults under load."""

import argparse
import asyncio
import secrets
import sys

from tests.faults import schedule

parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="replays the schedule of this seed; default: a new one")
parser.add_argument("--seconds", type=float, default=120.0, help="how long faults go on")
parser.add_argument("--jobs", type=int, default=200, help="jobs submitted meanwhile")
parser.add_argument("--watchers", type=int, default=100, help="watchers that reconnect meanwhile")
options = parser.parse_args()
sys.exit(asyncio.run(schedule.main(seed=options.seed, seconds=options.seconds, jobs=options.jobs, watchers=options.watchers)))
