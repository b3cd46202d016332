"""The collector: exchange sockets to Redis lists."""
