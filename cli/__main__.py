"""`python -m flashcocos.cli COMMAND`, as torchrun starts it."""

from __future__ import annotations

import sys

from .main import main

sys.exit(main())
