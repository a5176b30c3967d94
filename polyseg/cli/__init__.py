"""The command line: arguments and printing; the only package that imports typer and rich."""
