"""The driver: one step's data in shards that advance together from yield to yield."""
