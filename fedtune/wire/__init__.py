"""Messages between server and devices: client updates, their checks and payloads."""
