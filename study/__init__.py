"""The replication: protocol, runs, tables and what they say."""
