"""Training scripts, to be run by `accelerate launch -m` or by `qtuning`."""
