"""`python -m megatron_fp32_router`: the same as the console script."""

import sys

from megatron_fp32_router.cli import main

if __name__ == "__main__":
    sys.exit(main())
