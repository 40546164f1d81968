"""The tasks of the paper as OpenCompass 0.4.2 put them, for lm-eval: `qtuning eval --protocol paper`."""
