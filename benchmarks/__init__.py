"""Side by side: this, what it is built from, and what others use."""
