"""Training scripts, to be run by `accelerate launch -m` or by `qtuning`."""

from ..quiet import hush_known_warnings

hush_known_warnings()
