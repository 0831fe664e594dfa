"""The command line: one file per command. Each parses its options, calls the library and prints the result."""
