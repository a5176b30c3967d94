"""MC-Dropout passes that compute their common part once."""
