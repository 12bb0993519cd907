"""`python -m hybridmem` is the command `hybridmem`."""

from .cli import main

main()
