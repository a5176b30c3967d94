"""A page for people about runs: read what is there, tables and figures of it, one HTML file."""
