"""What several test files share: the scripts on the path, and where the real data may be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"
torch.set_num_threads(1)  # tiny maps: a second thread mostly waits, much longer on a busy machine


@pytest.fixture
def shared():
    """The folder of real data, which is not part of the repository."""
    if not SHARED.exists():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture
def script(tmp_path):
    """Run a script as a user does, from an empty folder -> finished process with text output."""
    def run(*command, **environment):
        return subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])],
                              cwd=tmp_path, env=os.environ | environment, text=True,
                              capture_output=True, timeout=120)
    return run
