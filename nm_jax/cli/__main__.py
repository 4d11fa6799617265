"""`python -m nm_jax.cli` is `nm-jax`."""

import sys

from nm_jax.cli import main

sys.exit(main())
