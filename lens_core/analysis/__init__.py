"""Analysis: small plain functions over the public API, one module for each question."""
