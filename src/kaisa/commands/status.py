"""The exit statuses of the commands; 0 is done."""

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
