"""A device as the plugin serves it: its configuration, its parts opened together, its upkeep."""
