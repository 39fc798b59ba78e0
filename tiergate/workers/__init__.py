"""Several worker processes behind one port: a supervisor that owns the sockets, and the workers that it keeps."""
