"""The gateway serves devices and operators over HTTPS and refuses all other requests."""
