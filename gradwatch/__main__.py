"""``python -m gradwatch``: the same as the command ``gradwatch``."""

from __future__ import annotations

import sys

from gradwatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
