"""Everything at once: the product's processes under a seeded schedule of every fault there is."""
