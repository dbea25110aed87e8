"""fastssl, which kills itself: python -m tests.train.killed_run STEP pretrain RECIPE ...

It ends by kill -9 with STEP optimizer steps done, its readers busy with the batches to come.
"""

import os
import signal
import sys

from fastssl.cli import main
from fastssl.engine.engine import Engine


def kill_at(last: int) -> None:
    """From now on the step after `last` ends this process."""
    step = Engine.step

    def killed(self, *args, **options):
        if self.ds.global_steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **options)

    Engine.step = killed


if __name__ == "__main__":
    kill_at(int(sys.argv.pop(1)))
    main()
