"""polyseg: medical image segmentation with an uncertainty-adaptive loss.

The rooms, in the order in which they may import one another, are listed in docs/house.md.
Importing this package imports none of them, so that the command line starts at once.
"""

__version__ = "0.1.0"
INTENDED_USE = "For research use only. Not a medical device."
