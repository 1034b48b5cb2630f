"""`make prove`: everything that takes longer than `make test` may, and the report the README quotes."""
