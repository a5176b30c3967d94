"""`python -m polyseg` is `polyseg`."""

from polyseg.cli.main import main

main()
