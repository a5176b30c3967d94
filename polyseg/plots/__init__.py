"""Every figure, from plain arrays: nothing here knows of networks, settings or stored formats."""
