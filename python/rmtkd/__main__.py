"""`python -m rmtkd`."""

import sys

from rmtkd.cli import main

sys.exit(main())
