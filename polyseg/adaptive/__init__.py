"""Turn difficulty into epsilon during a run, replay recorded epsilons, and analyse them."""
