"""The seam between processes: sockets (`base`, `zmq`) and what survives a crash (`segments`, `spool`)."""
