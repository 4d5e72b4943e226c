"""`python -m eigentrack`."""

import sys

from eigentrack.cli import main

sys.exit(main())
