"""The flusher: Redis lists to TimescaleDB."""
