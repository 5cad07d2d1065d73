"""The command line, `bert-fast`: one module a command, imported only when its command runs."""
