"""Write runs and evaluations as one HTML page."""
