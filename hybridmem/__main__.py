"""`python -m hybridmem` is the command `hybridmem`."""

from hybridmem.cli.main import main

main()
