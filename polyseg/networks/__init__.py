"""Networks by name or import path, their dropout layers, and inference."""
