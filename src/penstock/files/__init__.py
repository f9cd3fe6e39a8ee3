"""Files as sources and outputs: ``ps.read`` and ``ps.write``. Nothing here touches networks or event logs."""
