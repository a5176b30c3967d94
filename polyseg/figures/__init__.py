"""Draw every figure; the only package that imports matplotlib."""
