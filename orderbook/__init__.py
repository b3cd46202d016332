"""The orderbook process: snapshots and diffs to true books, and those to Redis lists."""
