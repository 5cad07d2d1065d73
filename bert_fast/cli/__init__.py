"""The command line `bert-fast`: one module per command, imported when the command runs."""
