"""Where a function runs: on the event loop, in threads, in processes. Nothing here knows of flows."""
