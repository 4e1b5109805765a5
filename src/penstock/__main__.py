"""`python -m penstock`: the same as the command `penstock`."""

import sys

from penstock.cli import main

sys.exit(main())
