"""Files, locks, signals, memory, processes, random seeds and strict YAML."""
