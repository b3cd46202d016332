"""A faithful exchange that misbehaves on command."""
