"""Entry point of `python -m hybridmem`, equivalent to the command `hybridmem`."""

from hybridmem.cli.main import main

main()
