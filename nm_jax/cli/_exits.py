"""The exit codes that scripts rely on."""

DONE, VIOLATED, USAGE, FILES, INTERRUPTED, PIPE = 0, 1, 2, 3, 130, 141
