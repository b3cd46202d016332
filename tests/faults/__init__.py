"""The means to break everything around the processes: their network, Redis, PostgreSQL, disks."""
