"""The work of each command, independent of a terminal: one module per command.

Functions raise PolysegError for a user's error, such as unusable data, settings, files or folders.
"""
