"""Random access to what users have: one file a kind of source."""
