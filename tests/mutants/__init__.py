"""The product broken on purpose, in ways that a suite must notice: a test of the tests."""
