"""What is shown of runs: their pictures, and the page of `qtuning report`."""
