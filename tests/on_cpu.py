"""Imported first by the server that tests' processes fork from: they leave a GPU alone."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
