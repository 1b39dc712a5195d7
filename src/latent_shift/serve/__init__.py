"""A web page and an HTTP API for generating clips, with a queue that survives the server."""
