"""`python -m polyseg` is `polyseg`."""

from polyseg.cli import main

main()
