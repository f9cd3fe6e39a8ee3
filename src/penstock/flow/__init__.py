"""What is to be done, and its running: flows, jobs, reports. Nothing here touches files, networks or logs."""
