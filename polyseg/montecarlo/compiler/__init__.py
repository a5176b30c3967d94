"""MC-Dropout passes that compute once what all passes have in common."""
