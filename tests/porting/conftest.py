"""What imports Lightning is no test: the tests do without it."""

collect_ignore = ["idioms", "write_checkpoint.py"]
