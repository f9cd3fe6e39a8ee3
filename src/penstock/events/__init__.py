"""Event-driven systems: a durable event log in one file, with groups, leases, retries, dead letters and keyed state."""
