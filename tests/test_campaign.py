"""A short campaign of `campaigns/kills.py`: its moments are files, so that they are the same each time."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))
from kills import Campaign


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    campaign = Campaign(str(tmp_path), "fork")  # all is imported
    assert campaign.files > 50
    assert campaign.run("killed", random.Random(7), 3, ("at a file",)) == 3
