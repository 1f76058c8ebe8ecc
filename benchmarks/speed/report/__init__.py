"""Reports: one JSON document (versioned, with a schema) and what is made from it."""
