"""One operation per file: a `reference` that reads as its definition and a fast path of the same signature."""
