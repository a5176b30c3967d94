"""What each command does, without a terminal: one module a command.

Functions raise PolysegError for a user's error, such as unusable data, settings, files or folders.
"""
