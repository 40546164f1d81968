"""What is done around training: comparing pruners, evaluating models, scoring data sets."""
