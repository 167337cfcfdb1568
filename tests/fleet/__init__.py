"""Tests of jobs on a Ray cluster. Its servers listen on the loopback alone, which Ray reads as it is imported."""

import os

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
