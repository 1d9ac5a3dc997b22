"""The studies' own tests; `make test-studies` runs them."""
