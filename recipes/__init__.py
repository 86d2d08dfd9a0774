"""The recipes. Installed they are ``ldam_plugins.recipes``, and modules of one another as here."""

import sys
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:  # where `from options import ...` looks
    sys.path.insert(0, str(Path(__file__).parent))
