"""Generate images of lesions whose difficulty is known."""
