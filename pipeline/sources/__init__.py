"""Where images come from, one file a source, and the writer that turns a source into shards."""
