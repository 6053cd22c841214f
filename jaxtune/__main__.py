"""``python -m jaxtune`` is the ``jaxtune`` command."""

import sys

from jaxtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
