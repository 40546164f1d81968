"""Run by `test_smollm2.py`: the run that it resumes, ended by SIGKILL in its second step."""

import os
import signal
import sys

from test_smollm2 import resumable
from transformers import TrainerCallback


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


trainer = resumable(*sys.argv[1:])
trainer.add_callback(Kill())
trainer.train()
