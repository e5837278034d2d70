"""``python -m kvpolicy.lab.harness``: the command line of lm-eval, which then knows the model type ``kvpolicy``."""

import sys

from kvpolicy.errors import KvpolicyError
from kvpolicy.lab.harness.calling import call_harness

if __name__ == "__main__":
    try:
        call_harness(sys.argv[1:])
    except KvpolicyError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
