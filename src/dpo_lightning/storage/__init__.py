"""Files that survive kills and neighbours: caches, locks, JSON lines, digests."""
