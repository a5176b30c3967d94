"""The jobs behind the commands, a room each, put together from the rooms above."""
