"""The command for launchers that start modules: `accelerate launch -m depthmix_cli …`."""

import sys

from depthmix_cli import main

if __name__ == "__main__":
    sys.exit(main())
