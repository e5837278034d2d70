"""`python -m kvpolicy` is the `kvpolicy` command."""

import sys

from kvpolicy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
